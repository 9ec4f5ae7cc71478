"""Requests about files that carry none: look at them, list, make and remove them."""

from __future__ import annotations

from functools import partial

from agent.channel import Channel
from agent.errors import AgentError
from agent.files import tree
from agent.files.behind import in_thread
from agent.files.guest_path import GuestPath, Owner
from agent.images.tree_removal import remove_tree_in
from agent.services import Services
from protocol import AgentResponse, requests, responses
from protocol.errors import ErrorCode

DIRECTORY_MODE = 0o755
_MODE_BITS = 0o7777


async def file_stat(
    request: requests.FileStat, channel: Channel, services: Services
) -> AgentResponse:
    path = GuestPath.parse(request.path)
    async with services.roots.opened(request.persistent_overlay_id) as site:
        describe = partial(tree.describe, site.root, path, follow=request.follow)
        return responses.Ok(await in_thread(describe))


async def file_list(
    request: requests.FileList, channel: Channel, services: Services
) -> AgentResponse:
    path = GuestPath.parse(request.path)
    limit = tree.MOST_ENTRIES if request.limit is None else request.limit
    if not 1 <= limit <= tree.MOST_ENTRIES:
        raise AgentError(
            ErrorCode.INVALID_REQUEST, f"limit: expected 1 to {tree.MOST_ENTRIES}, got {limit}"
        )
    async with services.roots.opened(request.persistent_overlay_id) as site:
        list_entries = partial(tree.listed, site.root, path, after=request.after, limit=limit)
        listing = await in_thread(list_entries)
    return responses.Ok({"entries": listing.entries, "more": listing.more})


async def file_remove(
    request: requests.FileRemove, channel: Channel, services: Services
) -> AgentResponse:
    path = GuestPath.parse(request.path)
    if not path.parts:
        raise AgentError(ErrorCode.INVALID_REQUEST, "path: the root cannot be removed")
    async with services.roots.opened(request.persistent_overlay_id) as site:
        remove = partial(
            tree.remove,
            site.root,
            path,
            missing_ok=request.missing_ok,
            remove_tree=remove_tree_in if request.recursive else None,
        )
        await in_thread(remove)
    return responses.Ok()


async def file_mkdir(
    request: requests.FileMkdir, channel: Channel, services: Services
) -> AgentResponse:
    path = GuestPath.parse(request.path)
    owner = Owner.of(request.uid, request.gid)
    mode = DIRECTORY_MODE if request.mode is None else request.mode & _MODE_BITS
    async with services.roots.opened(request.persistent_overlay_id) as site:
        created = await in_thread(tree.make_directory, site.root, path, owner, mode)
    return responses.Ok({"created": created})
