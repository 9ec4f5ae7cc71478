#!/bin/sh
# What udhcpc runs, with the name of what has happened and its variables: keeps the lease in the file
# LEASE, and says in the FIFO CHANGED that it is another. All else is the agent's (uplink.py).
set -eu

changed() {
    # Opened both ways nobody need read it: the next agent looks into the file.
    echo >&3
    exit 0
}
exec 3<>"$CHANGED"

case $1 in
bound | renew)
    read -r now rest </proc/uptime
    printf '%s\n' "client=$PPID" "at_s=$now" "ip=${ip-}" "mask=${mask-}" "router=${router-}" \
        "staticroutes=${staticroutes-}" "dns=${dns-}" "search=${search-}" "domain=${domain-}" \
        "mtu=${mtu-}" "lease=${lease-}" "serverid=${serverid-}" >"$LEASE.new"
    mv "$LEASE.new" "$LEASE"
    changed
    ;;
deconfig)
    # It begins with this, too; what another client got is valid until its time is over.
    while IFS='=' read -r name value; do
        if [ "$name" = client ] && [ "$value" = "$PPID" ]; then
            mv "$LEASE" "$LEASE.lost"
            changed
        fi
    done 2>/dev/null <"$LEASE" || :
    ;;
esac
