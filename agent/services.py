"""What the agent has running: opened once, used by every handler, taken down in order."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import trio

from agent.bridges import Bridges, open_bridges
from agent.config import AgentConfig
from agent.errors import AgentError, cause_of, failing_as
from agent.files.journal import Journal
from agent.gate import Gate
from agent.guest_roots import GuestRoots
from agent.image_services import Images, open_images
from agent.introspection import Introspection
from agent.later import Later
from agent.network.host import Host
from agent.network.probe import Probe
from agent.processes.container import ContainerRuntime
from agent.processes.limits import Limits
from agent.processes.oom_protection import OomProtection
from agent.processes.service import Processes, open_processes
from agent.processes.shares import Shares
from agent.processes.standing import StandingContainers
from agent.resumption import Kernel, Resumer, set_clock_at_boot
from agent.storage.disk import Disk
from agent.storage.root_disk import RootDisk
from agent.storage.write_back import write_back_everything
from agent.vm_network import VmNetwork
from agent.work import Work
from protocol import requests
from protocol.errors import ErrorCode

if TYPE_CHECKING:
    from agent.diagnostics import Diagnostics
    from agent.statistics import Statistics

log = logging.getLogger(__name__)

# Sync, unmount and power-off have to fit into a host's patience with them.
STOP_GRACE_S = 1.5
_ENDING_S = 3.3
_WRITING_BACK_S = 0.5
_WORTH_TRIMMING_BYTES = 64 << 20
# A storage that is frozen lets nobody write, and is in order.
_WRITE_LIMIT_S = 2.0
WORKSPACE_MOUNT = Path("/workspace")
# Where init has put the agent.
CGROUP_OF_AGENT = Path("/sys/fs/cgroup/agent")


@attrs.define(eq=False)
class Services:
    """The agent's long-lived parts. Those that are still coming up stand behind gates."""

    config: AgentConfig
    disk: Disk
    processes: Processes
    containers: ContainerRuntime
    standing: StandingContainers
    host: Host
    bridges: Bridges
    roots: GuestRoots
    images: Gate[Images]
    vm_network: VmNetwork
    statistics: Later[Statistics]
    diagnostics: Later[Diagnostics]
    shares: Shares
    kernel: Kernel | None = None
    """What of the kernel is ours to set, if it is ours."""
    probe: Probe = attrs.field(factory=Probe)
    work: Work = attrs.field(factory=Work)
    stopped: trio.Event = attrs.field(factory=trio.Event)
    """Set when the machine may be powered off."""
    _bringing_up: trio.Lock = attrs.field(factory=trio.Lock)
    _tries_to_write: trio.CapacityLimiter = attrs.field(factory=partial(trio.CapacityLimiter, 1))
    resumer: Resumer = attrs.field(init=False)

    @resumer.default
    def _make_resumer(self) -> Resumer:
        return Resumer(
            self.config.storage_dir,
            self._storage_problem,
            self.network,
            self.vm_network.renew,
            self.kernel,
        )

    @property
    def network(self) -> Gate[None]:
        """Open once the VM has a network."""
        return self.vm_network.gate

    def refuse_new_work(self, kind: type) -> None:
        """Raise for new work once a shutdown has begun, or where the configuration cannot be gone
        by; a (second) shutdown and a ping may pass, and looking may go on in the latter case."""
        if kind in (requests.Ping, requests.Shutdown):
            return
        if self.work.is_stopping:
            raise self.work.refusal()
        if self.config.refusal is not None and kind is not requests.Diagnose:
            raise AgentError(ErrorCode.INVALID_REQUEST, self.config.refusal)

    async def bring_up_images(self) -> None:
        """Mount the storage and open what is kept there; nothing changes where it is up.

        Raises:
            AgentError: the cause; those who wait at the gate are turned back with it.
        """
        async with self._bringing_up:
            if self.images.is_open:
                await trio.to_thread.run_sync(self.disk.bring_up)
                return
            try:
                self.images.open(await trio.to_thread.run_sync(self._open_images))
            except AgentError as error:
                log.error("storage: %s", error.message)
                self.images.fail(error)
                raise
            except Exception as error:
                log.exception("storage: internal error")
                failure = AgentError(
                    ErrorCode.INTERNAL_ERROR, f"bring up the storage: {cause_of(error)}"
                )
                self.images.fail(failure)
                raise failure from error

    def _open_images(self) -> Images:
        self.disk.bring_up()
        return open_images(self.config, self.shares)

    async def _storage_problem(self) -> str | None:
        """Why what is stored cannot be had, if it cannot."""
        await self.images.decided()
        return None if self.images.failure is None else self.images.failure.message

    async def write_problem(self) -> str | None:
        """Why the storage, which is up, takes no writes any more, if that can be told at once."""
        with trio.move_on_after(_WRITE_LIMIT_S):
            return await trio.to_thread.run_sync(
                self.disk.write_problem, abandon_on_cancel=True, limiter=self._tries_to_write
            )
        return None

    def trim_after(self, freed_bytes: int) -> None:
        """Give room back to the host in the background, if it is worth the trouble."""
        if freed_bytes >= _WORTH_TRIMMING_BYTES:
            self.processes.lifetime.start_soon(trio.to_thread.run_sync, self.disk.trim)

    async def power_off(self) -> None:
        """Stop, and have the machine powered off."""
        await self.stop()
        self.stopped.set()

    async def stop(self) -> None:
        """End all work, write everything back and let the disk go, so that power may be cut.

        Takes at most about 4 s; goes on past every single failure, and logs it.
        """
        self.work.stop()
        # A process that is stuck in the kernel, at a share that does not answer, ends with the VM.
        with trio.move_on_after(_ENDING_S):
            await self.standing.end_idle()
            await self.processes.stop_all(STOP_GRACE_S)
            await self.work.ended()
        await self.vm_network.end()
        await trio.to_thread.run_sync(self._let_storage_go)
        if self.kernel is not None:
            await self._write_back_the_rest()

    async def _write_back_the_rest(self) -> None:
        """What commands have mounted: shares, which may not answer any more, and disks."""
        with trio.move_on_after(_WRITING_BACK_S) as limit:
            try:
                await trio.to_thread.run_sync(write_back_everything, abandon_on_cancel=True)
            except (OSError, subprocess.SubprocessError) as error:
                log.error("shutdown: sync: %s", cause_of(error))
        if limit.cancelled_caught:
            log.warning("shutdown: not everything is written back: a share may not answer")

    def _let_storage_go(self) -> None:
        steps = [self.disk.let_go]
        steps += [RootDisk(directory).let_go for directory in self.config.root_disks]
        if self.images.is_open:
            images = self.images.value
            steps = [images.overlays.unmount_all, images.layers.unmount_all, *steps]
        for step in steps:
            try:
                step()
            except OSError as error:
                log.error("shutdown: %s: %s", step.__qualname__, cause_of(error))


@asynccontextmanager
async def open_services(
    config: AgentConfig, cgroup_root: Path | None, introspection: Introspection | None = None
) -> AsyncIterator[Services]:
    """Services whose storage and network come up in the background.

    ``cgroup_root`` is the directory of cgroup2 below which commands run, if there is one. Leaving
    ends what looks after things for the agent's own lifetime; it does not stop what runs or
    unmount anything: that is ``stop``, and an agent that merely restarts finds it all again.
    """
    limits, protection = None, None
    with ExitStack() as held:
        if config.root_error is not None:
            log.error("root: %s; changes to / are kept in memory", config.root_error)
        if config.in_image:
            limits = Limits.inspect(
                memory=config.workload_memory,
                pids=config.workload_pids,
                command_pids=config.command_pids,
            )
            limits.protect_agent(CGROUP_OF_AGENT)
            protection = held.enter_context(OomProtection.held())
        logs = config.run_dir / "logs"
        async with (
            open_processes(cgroup_root, logs, limits=limits, protection=protection) as processes,
            trio.open_nursery() as nursery,
        ):
            host = Host(config.host_sockets, reachable=config.listen.startswith("vsock:"))
            bridges = open_bridges(config, host, held, nursery)
            with failing_as(ErrorCode.INTERNAL_ERROR, f"take over {config.run_dir}"):
                containers = ContainerRuntime.open(processes, config.run_dir, crun=config.crun)
                standing = StandingContainers.open(containers, init=config.catatonit)
                journal = Journal(config.run_dir / "uploads")
            for bind in bridges.binds:
                await standing.renew(bind)
            disk = Disk(
                config.storage_dir,
                config.storage_device,
                config.storage_in_memory,
                WORKSPACE_MOUNT if config.in_image else None,
            )
            images: Gate[Images] = Gate()
            vm_network = VmNetwork.of(config)
            shares = Shares(at_boot=config.boot_mounts)
            agent_cgroup = CGROUP_OF_AGENT if config.in_image else None

            def make_statistics() -> Statistics:
                from agent.statistics import Statistics

                return Statistics(processes, standing, agent_cgroup)

            def make_diagnostics() -> Diagnostics:
                from agent.diagnostics import Diagnostics
                from agent.machine.versions import IMAGE_VERSIONS, KnownVersions

                return Diagnostics(
                    introspection=introspection or Introspection(),
                    disk=disk,
                    images=images,
                    network=vm_network,
                    processes=processes,
                    standing=standing,
                    versions=KnownVersions(
                        config.crun, config.mkfs_erofs, IMAGE_VERSIONS if config.in_image else None
                    ),
                    agent_cgroup=agent_cgroup,
                )

            kernel = Kernel.of(config)
            if kernel is not None:
                set_clock_at_boot(kernel.clock, config.host_time_ns)
            services = Services(
                config=config,
                disk=disk,
                processes=processes,
                containers=containers,
                standing=standing,
                host=host,
                bridges=bridges,
                shares=shares,
                roots=GuestRoots(
                    images, standing, shares.claiming(WORKSPACE_MOUNT) or disk.workspace, journal
                ),
                images=images,
                vm_network=vm_network,
                statistics=Later(make_statistics),
                diagnostics=Later(make_diagnostics),
                kernel=kernel,
            )
            nursery.start_soon(services.roots.keep_clean)
            nursery.start_soon(_bring_up_at_boot, services)
            nursery.start_soon(services.vm_network.run)
            yield services
            nursery.cancel_scope.cancel()


async def _bring_up_at_boot(services: Services) -> None:
    if services.shares.at_boot:
        await trio.to_thread.run_sync(services.shares.mount_at_boot)
    # Those who wait at the gate are told; the log has it already.
    with suppress(AgentError):
        await services.bring_up_images()
        packed = services.images.value.packed
        if packed is not None and not services.work.is_stopping:
            # It may write as much as a pull does.
            with services.work.under_way(requests.Pull):
                await packed.look_at_boot()
