"""One error for all that can go wrong between this machine and the Hub, saying what happened and what to do."""
from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

__all__ = ['HubError', 'hub_errors', 'is_unreachable']

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_LOGIN = 'log in with `hf auth login` or pass token='
_RETRIED_LATER = (408, 429, 500, 502, 503, 504)


class HubError(OSError):
    """A failure of the Hub, the network or the cache. `__cause__` is the error of the library below.

    A mistake in the arguments or in a file's content is a ValueError instead.
    """


@contextlib.contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub, of the network and of the disk into a `HubError`.

    Args:
        doing: What is being done, to begin the message with, e.g. `'Loading user/name'`.

    Raises:
        HubError: If the block raises an error of the Hub or network, which becomes the cause.
    """
    try:
        yield
    except (HubError, FileExistsError):
        raise
    except (HTTPError, EntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(f'{doing} failed: {_explain_hub(error)}') from error
    except OSError as error:
        raise HubError(f'{doing} failed: {_explain_disk(error)}') from error


def is_unreachable(error: BaseException) -> bool:
    """Whether a request failed for a reason that may be gone later: no network, or a Hub that is down or busy."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _RETRIED_LATER
    return isinstance(error, (HTTPError, OfflineModeIsEnabled))


def _explain_hub(error: BaseException) -> str:
    root = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(root, GatedRepoError):
        return (
            f'the repository is gated. Ask for access on its page at {constants.ENDPOINT}, then {_LOGIN} (with the '
            'account that has been given access).'
        )
    if isinstance(root, RepositoryNotFoundError):
        return f'the repository does not exist, or it is private. Check the spelling; if it is private, {_LOGIN}.'
    if isinstance(root, RevisionNotFoundError):
        return 'the repository has no such revision. Name a branch, tag or commit that it has.'
    if isinstance(root, HfHubHTTPError):
        return _explain_status(root)
    if isinstance(root, OfflineModeIsEnabled) or (isinstance(root, LocalEntryNotFoundError) and _is_offline()):
        return (
            'it is not completely in the local cache, and HF_HUB_OFFLINE=1 forbids downloads. Unset it and run again, '
            'or load it once while online.'
        )
    if isinstance(root, LocalEntryNotFoundError):
        return 'it is not completely in the local cache. Run again with local_files_only=False and a network.'
    if isinstance(root, EntryNotFoundError):
        return f'the repository lacks the file: {root}'
    return (
        f'no answer from {constants.ENDPOINT} ({type(root).__name__}: {root}). Check the network (proxy, firewall, '
        'HF_ENDPOINT) and run the same again; nothing was left incomplete.'
    )


def _explain_status(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = f'the Hub answered {status} ({error.server_message or type(error).__name__})'
    if status == 401:
        return f'{said}: the token is missing, wrong or expired. To replace it, {_LOGIN}.'
    if status == 403:
        return f'{said}: the token may not do this. Use a token with write access to this repository; {_LOGIN}.'
    if status == 429:
        wait = error.response.headers.get('Retry-After')
        after = f'{wait} seconds' if wait else 'a few minutes'
        return f'{said}: too many requests. Wait {after} and run the same again; logging in raises the limit.'
    if status == 412:
        return f'{said}: the repository has changed in the meantime. Check what is new there and run the same again.'
    if status in _RETRIED_LATER:
        return f'{said}: the Hub is unavailable. Run the same again in a few minutes (https://status.huggingface.co).'
    return f'{said}: {error}'


def _explain_disk(error: OSError) -> str:
    if error.errno in _DISK_FULL:
        return (
            f'the disk is full ({error}). Free some space, or put the cache elsewhere with HF_HOME or cache_dir=, '
            'and run the same again; no half-written file stays in the cache.'
        )
    if error.errno in _NOT_WRITABLE:
        return (
            f'the cache is not writable ({error}). Put it elsewhere with HF_HOME or cache_dir=, '
            'or fill it beforehand and pass local_files_only=True.'
        )
    return f'{type(error).__name__}: {error}'


def _is_offline() -> bool:
    return bool(constants.HF_HUB_OFFLINE)
