"""Who answers what: one async function for each request class, under its wire method's name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agent.channel import Channel
from agent.handlers.containers import run
from agent.handlers.file_tree import file_list, file_mkdir, file_remove, file_stat
from agent.handlers.files import file_read, file_write, file_write_begin, file_write_chunk
from agent.handlers.images import (
    export_layer,
    flatten_layers,
    garbage_collect,
    list_images,
    pull,
    query,
)
from agent.handlers.machine import (
    diagnose,
    format_storage,
    network_test,
    resumed,
    shutdown,
    storage_status,
    vm_stats,
)
from agent.handlers.overlays import cleanup_overlay, prepare_overlay
from agent.handlers.processes import vm_exec
from agent.handlers.tar_streams import tar_read, tar_write
from agent.services import Services
from protocol import AgentResponse, requests

# A handler takes its own request class, which a mapping over all of them cannot say.
# None: the request has had its final answer, and ended later.
Handler = Callable[[Any, Channel, Services], Awaitable[AgentResponse | None]]


HANDLERS: Mapping[type, Handler] = {
    requests.Pull: pull,
    requests.Query: query,
    requests.ListImages: list_images,
    requests.GarbageCollect: garbage_collect,
    requests.PrepareOverlay: prepare_overlay,
    requests.CleanupOverlay: cleanup_overlay,
    requests.FormatStorage: format_storage,
    requests.StorageStatus: storage_status,
    requests.NetworkTest: network_test,
    requests.Shutdown: shutdown,
    requests.Resumed: resumed,
    requests.ExportLayer: export_layer,
    requests.VmExec: vm_exec,
    requests.Run: run,
    requests.FileWrite: file_write,
    requests.FileWriteBegin: file_write_begin,
    requests.FileWriteChunk: file_write_chunk,
    requests.FileRead: file_read,
    requests.FileStat: file_stat,
    requests.FileList: file_list,
    requests.FileRemove: file_remove,
    requests.FileMkdir: file_mkdir,
    requests.TarWrite: tar_write,
    requests.TarRead: tar_read,
    requests.FlattenLayers: flatten_layers,
    requests.VmStats: vm_stats,
    requests.Diagnose: diagnose,
}
