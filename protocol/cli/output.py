"""What commands print: values for people, or the agent's own JSON."""

import json
import sys
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from protocol import encode, responses
from protocol.values import CollectedGarbage, ImageInfo, NetworkReport, PullPlan, Resumption

_SHOWN_DIGEST = 12
_WIDE = 10_000


def print_json(answer: responses.AgentResponse, *, flush: bool = False) -> None:
    """What the agent answered: the data of an ``ok``, any other answer as on the wire."""
    if isinstance(answer, responses.Ok):
        print(json.dumps(answer.data, ensure_ascii=False), flush=flush)
    else:
        print(encode(answer).decode(), flush=flush)


def print_error(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    line = "".join(c if c.isprintable() else " " for c in message.strip())
    print(f"innkeep: {line}", file=sys.stderr)


def print_table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Aligned columns; in a pipe nothing is wrapped or cut."""
    table = new_table(headings)
    for row in rows:
        table.add_row(*row)
    console().print(table)


def new_table(headings: Iterable[str]) -> Table:
    """One without rows yet."""
    return Table(*headings, box=None, pad_edge=False, header_style="bold")


def console() -> Console:
    """Standard output, for text that means what it says."""
    # Not the width of a terminal that is not there: columns would be cut at 80 characters.
    width = None if sys.stdout.isatty() else _WIDE
    return Console(width=width, markup=False, highlight=False)


def print_values(values: Mapping[str, str]) -> None:
    """One ``name: value`` a line, aligned."""
    widest = max(map(len, values))
    for name, value in values.items():
        print(f"{name + ':':<{widest + 1}} {value}")


def print_images(images: Iterable[ImageInfo]) -> None:
    """The table of ``innkeep images``."""
    print_table(
        ("IMAGE", "DIGEST", "PLATFORM", "LAYERS", "SIZE"),
        (
            (
                image.reference,
                short_digest(image.digest),
                f"{image.os}/{image.architecture}",
                str(image.layer_count),
                decimal(image.size),
            )
            for image in images
        ),
    )


def print_image(image: ImageInfo) -> None:
    """The description of ``innkeep query``."""
    values = {
        "reference": image.reference,
        "digest": image.digest,
        "created": image.created,
        "platform": f"{image.os}/{image.architecture}",
        "size": decimal(image.size),
        "layers": ", ".join(map(short_digest, image.layers)),
        "entrypoint": " ".join(image.entrypoint),
        "command": " ".join(image.cmd),
        "environment": " ".join(image.env),
        "workdir": image.workdir,
        "user": image.user,
    }
    print_values({name: value for name, value in values.items() if value})


def print_plan(plan: PullPlan) -> None:
    """What ``innkeep pull --dry-run`` found: a line a layer, and what it comes to."""
    for layer in plan.layers:
        here = "" if layer.fetch_bytes else " (in the store)"
        print(f"{short_digest(layer.digest)} {decimal(layer.size)}{here}")
    print(
        f"{plan.reference}: {decimal(plan.fetch_bytes)} to fetch, about "
        f"{decimal(plan.disk_bytes)} of the disk's free {decimal(plan.free_bytes)} needed"
    )


def print_garbage(garbage: CollectedGarbage) -> None:
    """What ``innkeep gc`` did, as docker's prune says it."""
    for kind, names in (
        ("image", garbage.images),
        ("layer", garbage.layers),
        ("blob", garbage.blobs),
        ("partial blob", garbage.partial_blobs),
    ):
        for name in names:
            print(f"{kind}: {name}")
    verb = "would be freed" if garbage.dry_run else "freed"
    print(f"{decimal(garbage.freed_bytes)} {verb}")


def print_network_report(report: NetworkReport) -> None:
    """The steps of ``innkeep network-test``, each with what came of it."""
    dns, tcp, http = report.dns, report.tcp, report.http
    for name, duration_ms, outcome in (
        ("name", dns.duration_ms, dns.error or ", ".join(dns.addresses)),
        ("connect", tcp.duration_ms, tcp.error or tcp.address),
        ("http", http.duration_ms, http.error or f"status {http.status}"),
    ):
        print(f"{name:<8} {duration_ms:>5} ms  {outcome}")
    for problem in report.problems:
        print(f"network: {problem}")


def print_resumption(done: Resumption) -> None:
    """The steps of ``innkeep resumed``, each with what came of it."""
    clock, randomness = done.clock, done.randomness
    stepped = "right" if not clock.step_ns else f"stepped by {clock.step_ns / 1e9:+.3f} s"
    for name, outcome in (
        ("clock", clock.error or f"{stepped} ({clock.source or 'nobody told a time'})"),
        (
            "randomness",
            randomness.error or f"{randomness.credited_bytes} bytes ({randomness.source})",
        ),
        ("mounts", done.mounts.error or ", ".join(done.mounts.checked)),
        ("network", done.network.error or "as configured"),
    ):
        print(f"{name:<10}  {outcome}")


def short_digest(digest: str) -> str:
    """Enough of a digest's hex to tell it from others."""
    return digest.rpartition(":")[2][:_SHOWN_DIGEST]
