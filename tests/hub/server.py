"""A Hub on 127.0.0.1 for tests: the endpoints that huggingface_hub's client uses, in memory, with faults on demand.

Repositories have git-like revisions (commits, branches, tags, pull request refs), LFS objects, visibility, gates and
tokens. It answers what the client asks for and nothing more; what it answers was worked out from the client's source.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from .repos import Blob, HubReply, Repo, is_lfs


@dataclass
class Fault:
    """What goes wrong, for requests whose `METHOD /path` matches `pattern`, `times` times (-1: always).

    kind: `status` (answer `status`), `drop` (close unanswered), `lost` (do the work, then close unanswered),
    `truncate` and `reset` (send `after` bytes of the body, then FIN or RST), `flip` (invert the byte at `after`),
    `stall` (say nothing for `seconds`).
    """

    pattern: str
    kind: str
    status: int = 503
    after: int = 0
    seconds: float = 30.0
    times: int = -1
    headers: dict[str, str] = field(default_factory=dict)


class Hub:
    """State and life of the server; `with Hub() as hub:` serves on `hub.endpoint`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens = {'hf_alice': ('alice', 'write'), 'hf_bob': ('bob', 'write'), 'hf_alice_read': ('alice', 'read')}
        self.allowed: set[tuple[str, str]] = set()  # (user, repo id) let through a gate
        self.listed: dict[str, str] = {}  # repo id -> commit that its listing is of, where it lags behind
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.next_faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self.pull_requests = itertools.count(1)
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self}))
        self._server.daemon_threads = True
        self.endpoint = f'http://127.0.0.1:{self._server.server_port}'

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def reset(self) -> None:
        """Forget repositories, faults and the request log."""
        with self.lock:
            self.repos.clear()
            self.faults.clear()
            self.next_faults.clear()
            self.requests.clear()
            self.allowed.clear()
            self.listed.clear()
            self.pull_requests = itertools.count(1)

    def fault(self, pattern: str, kind: str, **kwargs: Any) -> None:
        self.faults.append(Fault(pattern, kind, **kwargs))

    def add_repo(self, repo_id: str, files: dict[str, bytes] | None = None, **kwargs: Any) -> Repo:
        """Make a repository with a first commit, as the Hub does, and optionally a second one with `files`."""
        repo = self.repos[repo_id] = Repo(repo_id, **kwargs)
        first = {'.gitattributes': Blob(b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n', False)}
        repo.commit('refs/heads/main', first, 'initial commit', repo_id.split('/')[0])
        if files:
            added = {path: Blob(data, is_lfs(path, len(data))) for path, data in files.items()}
            repo.commit('refs/heads/main', {**first, **added}, 'add files', repo_id.split('/')[0])
        return repo

    def files(self, repo_id: str, revision: str = 'main') -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.repos[repo_id].at(revision).files.items()}

    def take_fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: Hub

    # Without it every answer of two writes waits for a delayed ACK, some 40 ms a call.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # -- transport and faults ------------------------------------------------------------------------------------

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.parts = url.path.strip('/').split('/')
        self.query = {k: v[0] for k, v in parse_qs(url.query).items()}
        line = f'{self.command} {unquote(url.path)}'
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        self.hub.requests.append(line)
        self.fault = self.hub.take_fault(line)
        kind = self.fault.kind if self.fault else None
        if kind == 'stall':
            self.hub.closing.wait(self.fault.seconds)
        if kind in ('drop', 'stall'):
            self._hang_up()
            return
        try:
            if kind == 'status':
                raise HubReply(self.fault.status, f'fault {self.fault.status}')
            with self.hub.lock:
                headers, body = self._route()
            status = 200
        except HubReply as reply:
            headers = {'X-Error-Message': reply.message, **({'X-Error-Code': reply.code} if reply.code else {})}
            headers.update(getattr(reply, 'headers', {}))
            if kind == 'status':
                headers.update(self.fault.headers)
            status, body = reply.status, json.dumps(reply.body).encode()
        if kind == 'lost':
            self._hang_up()
            return
        self._send(status, headers, body)

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        start = 0
        wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
        if status == 200 and wanted and self.command == 'GET' and 'ETag' in headers:
            start, stop = int(wanted[1]), int(wanted[2] or len(body) - 1) + 1
            headers['Content-Range'] = f'bytes {start}-{stop - 1}/{len(body)}'
            status, body = 206, body[start:stop]
        self.send_response(status)
        headers.setdefault('Content-Length', str(len(body)))
        headers.setdefault('Content-Type', 'application/json')
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        kind, after = (self.fault.kind, self.fault.after - start) if self.fault else ('', 0)
        if kind == 'flip' and 0 <= after < len(body):
            body = body[:after] + bytes([body[after] ^ 0xFF]) + body[after + 1 :]
        if kind in ('truncate', 'reset') and after < len(body):
            self.wfile.write(body[: max(after, 0)])
            self._hang_up(reset=kind == 'reset')
            return
        self.wfile.write(body)

    def _hang_up(self, reset: bool = False) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)

    # -- who asks, and for what ----------------------------------------------------------------------------------

    def _user(self) -> tuple[str | None, str]:
        header = self.headers.get('Authorization')
        if header is None:
            return None, ''
        try:
            return self.hub.tokens[header.removeprefix('Bearer ')]
        except KeyError:
            raise HubReply(401, 'Invalid credentials in Authorization header') from None

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        user, role = self._user()
        repo = self.hub.repos.get(repo_id)
        owner = user == repo_id.split('/')[0]
        if repo is None or (repo.private and not owner):
            raise HubReply(404 if user else 401, 'Repository not found', 'RepoNotFound')
        if write and not user:
            raise HubReply(401, 'Unauthorized')
        if write and (role != 'write' or not (owner or self.query.get('create_pr'))):
            raise HubReply(403, f'You do not have the rights to write to {repo_id}')
        return repo

    def _route(self) -> tuple[dict[str, str], bytes]:
        parts, command = self.parts, self.command
        if parts[0] == 'api':
            return {}, json.dumps(self._api(command, parts[1:])).encode()
        if parts[0] == 'mend':  # a way for a client to say that the trouble with its repository is over
            repo_id = '/'.join(parts[1:])
            self.hub.faults = [fault for fault in self.hub.faults if repo_id not in fault.pattern]
            return {}, b'{}'
        if parts[0] == 'worsen':  # and that the next trouble may come
            self.hub.faults = [self.hub.next_faults.pop(0)]
            return {}, b'{}'
        if parts[0] == 'lfs-store':
            oid = parts[1]
            if command == 'PUT':
                if hashlib.sha256(self.body).hexdigest() != oid:
                    raise HubReply(400, 'content does not match its sha256')
                self.hub.lfs[oid] = self.body
            elif len(self.hub.lfs.get(oid, b'')) != json.loads(self.body)['size']:
                raise HubReply(422, 'object not stored')
            return {}, b'{}'
        repo_id = '/'.join(parts[:2])
        if parts[1].endswith('.git') and parts[2:] == ['info', 'lfs', 'objects', 'batch']:
            return {}, json.dumps(self._lfs_batch(repo_id.removesuffix('.git'))).encode()
        if parts[2:3] == ['resolve'] and command in ('GET', 'HEAD'):
            return self._resolve(repo_id, unquote(parts[3]), unquote('/'.join(parts[4:])))
        raise HubReply(404, f'no such endpoint: {command} {self.path}')

    def _resolve(self, repo_id: str, revision: str, path: str) -> tuple[dict[str, str], bytes]:
        repo = self._repo(repo_id)
        user, _ = self._user()
        if repo.gated and user != repo_id.split('/')[0] and (user, repo_id) not in self.hub.allowed:
            raise HubReply(403 if user else 401, f'Access to model {repo_id} is restricted', 'GatedRepo')
        commit = repo.at(revision)
        if path not in commit.files:
            reply = HubReply(404, 'Entry not found', 'EntryNotFound')
            reply.headers = {'X-Repo-Commit': commit.oid}  # type: ignore[attr-defined]
            raise reply
        blob = commit.files[path]
        headers = {
            'X-Repo-Commit': commit.oid,
            'ETag': f'"{blob.etag}"',
            'Accept-Ranges': 'bytes',
            'Content-Type': 'application/octet-stream',
        }
        if blob.lfs:
            headers.update({'X-Linked-Etag': f'"{blob.sha256}"', 'X-Linked-Size': str(len(blob.data))})
        return headers, blob.data

    # -- JSON API ------------------------------------------------------------------------------------------------

    def _api(self, command: str, parts: list[str]) -> Any:
        payload = json.loads(self.body) if self.headers.get('Content-Type', '').startswith('application/json') else {}
        if parts == ['whoami-v2']:
            user, role = self._user()
            if user is None:
                raise HubReply(401, 'Invalid username or password')
            token = {'accessToken': {'displayName': 'test', 'role': role}}
            return {'type': 'user', 'name': user, 'fullname': user, 'email': '', 'orgs': [], 'auth': token}
        if parts == ['validate-yaml']:
            return self._validate_yaml(payload)
        if parts[0] == 'repos':
            return self._repos(parts[1], payload)
        if parts[0] != 'models' or len(parts) < 3:
            raise HubReply(404, f'no such endpoint: {command} {self.path}')
        repo_id, action, rest = '/'.join(parts[1:3]), parts[3:4], parts[4:]
        if not action or action == ['revision']:
            return self._info(repo_id, unquote('/'.join(rest)) or 'main')
        handler = getattr(self, f'_{command.lower()}_{action[0]}', None)
        if handler is None:
            raise HubReply(404, f'no such endpoint: {command} {self.path}')
        return handler(repo_id, rest, payload)

    def _repos(self, action: str, payload: dict[str, Any]) -> Any:
        user, role = self._user()
        if user is None:
            raise HubReply(401, 'Invalid username or password')
        namespace = payload.get('organization') or user
        repo_id = f'{namespace}/{payload["name"]}'
        if namespace != user or role != 'write':
            raise HubReply(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
        if action == 'delete':
            del self._owned(repo_id).repos[repo_id]
            return {}
        url = {'url': f'{self.hub.endpoint}/{repo_id}'}
        if repo_id in self.hub.repos:
            raise HubReply(409, 'You already created this model repo', body={'error': 'exists', **url})
        private = payload.get('visibility') == 'private' or bool(payload.get('private'))
        self.hub.add_repo(repo_id, private=private)
        return url

    def _owned(self, repo_id: str) -> Hub:
        self._repo(repo_id, write=True)
        return self.hub

    def _validate_yaml(self, payload: dict[str, Any]) -> dict[str, Any]:
        block = re.match(r'^---\n(.*?)\n---\n', payload['content'], re.DOTALL)
        try:
            data = yaml.safe_load(block[1]) if block else {}
        except yaml.YAMLError as error:
            raise HubReply(400, 'bad yaml', body={'errors': [{'message': str(error)}]}) from None
        errors = []
        if not isinstance(data.get('license', 'mit'), str):
            errors.append({'message': '"license" must be a string'})
        if data.get('license') == 'other' and not data.get('license_name'):
            errors.append({'message': '"license_name" is required with license: other'})
        if data.get('base_model_relation') not in (None, 'adapter', 'finetune', 'merge', 'quantized'):
            errors.append({'message': '"base_model_relation" is not one of the known ones'})
        for result in [r for entry in data.get('model-index', []) for r in entry['results']]:
            if not {'task', 'dataset', 'metrics'} <= set(result) or not {'name', 'type'} <= set(result['dataset']):
                errors.append({'message': '"model-index" results need task, dataset{name,type} and metrics'})
        if errors:
            raise HubReply(400, 'invalid metadata', body={'errors': errors})
        return {'errors': [], 'warnings': []}

    def _info(self, repo_id: str, revision: str) -> dict[str, Any]:
        repo = self._repo(repo_id)
        commit = repo.at(self.hub.listed.get(repo_id, revision))
        details = bool(self.query.get('blobs'))
        siblings = [{'rfilename': p, **(b.describe() if details else {})} for p, b in sorted(commit.files.items())]
        basics = {'id': repo_id, 'modelId': repo_id, 'sha': commit.oid, 'private': repo.private, 'tags': []}
        return {**basics, 'gated': 'manual' if repo.gated else False, 'siblings': siblings}

    def _get_tree(self, repo_id: str, rest: list[str], payload: Any) -> list[dict[str, Any]]:
        commit = self._repo(repo_id).at(unquote(rest[0]))
        folder = unquote('/'.join(rest[1:]))
        inside = {p: b for p, b in commit.files.items() if not folder or p.startswith(folder + '/')}
        return [{'type': 'file', 'path': p, **b.describe()} for p, b in sorted(inside.items())]

    def _get_refs(self, repo_id: str, rest: list[str], payload: Any) -> dict[str, Any]:
        repo = self._repo(repo_id)
        groups = {'branches': 'refs/heads/', 'tags': 'refs/tags/', 'pullRequests': 'refs/pr/'}
        return {'converts': []} | {
            group: [
                {'name': ref.removeprefix(prefix), 'ref': ref, 'targetCommit': oid}
                for ref, oid in repo.refs.items()
                if ref.startswith(prefix)
            ]
            for group, prefix in groups.items()
        }

    def _get_commits(self, repo_id: str, rest: list[str], payload: Any) -> list[dict[str, Any]]:
        repo = self._repo(repo_id)
        repo.at(unquote(rest[0]))
        date = '2025-01-01T00:00:00.000Z'
        return [
            {'id': c.oid, 'title': c.title, 'message': '', 'date': date, 'authors': [{'user': c.user}]}
            for c in reversed(repo.commits)
        ]

    def _make_ref(self, repo_id: str, ref: str, start: str) -> dict[str, Any]:
        repo = self._repo(repo_id, write=True)
        if ref in repo.refs:
            raise HubReply(409, f'Reference already exists: {ref}')
        repo.refs[ref] = repo.at(start).oid
        return {}

    def _post_branch(self, repo_id: str, rest: list[str], payload: Any) -> dict[str, Any]:
        return self._make_ref(repo_id, f'refs/heads/{unquote("/".join(rest))}', payload.get('startingPoint') or 'main')

    def _post_tag(self, repo_id: str, rest: list[str], payload: Any) -> dict[str, Any]:
        return self._make_ref(repo_id, f'refs/tags/{payload["tag"]}', unquote('/'.join(rest)))

    def _put_settings(self, repo_id: str, rest: list[str], payload: Any) -> dict[str, Any]:
        repo = self._repo(repo_id, write=True)
        repo.gated = bool(payload.get('gated', repo.gated))
        repo.private = {'private': True, 'public': False}.get(payload.get('visibility'), repo.private)
        return {}

    def _post_preupload(self, repo_id: str, rest: list[str], payload: Any) -> dict[str, Any]:
        current = self._repo(repo_id, write=True).at(unquote(rest[0])).files
        answers = []
        for file in payload['files']:
            mode = 'lfs' if is_lfs(file['path'], file['size']) else 'regular'
            oid = {'oid': current[file['path']].etag} if file['path'] in current else {}
            answers.append({'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False, **oid})
        return {'files': answers}

    def _lfs_batch(self, repo_id: str) -> dict[str, Any]:
        user, role = self._user()
        if role != 'write':
            raise HubReply(401 if user is None else 403, 'no write access')
        objects = []
        for item in json.loads(self.body)['objects']:
            url = f'{self.hub.endpoint}/lfs-store/{item["oid"]}'
            stored = item['oid'] in self.hub.lfs
            actions = {} if stored else {'actions': {'upload': {'href': url}, 'verify': {'href': f'{url}/verify'}}}
            objects.append({'oid': item['oid'], 'size': item['size'], **actions})
        return {'transfer': 'basic', 'objects': objects}

    def _post_commit(self, repo_id: str, rest: list[str], payload: Any) -> dict[str, Any]:
        repo = self._repo(repo_id, write=True)
        revision = unquote('/'.join(rest))
        ref = repo.ref_of(revision)
        if ref is None or ref.startswith('refs/tags/'):
            raise HubReply(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        header: dict[str, Any] = {}
        files = dict(repo.at(revision).files)
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item['key'], item['value']
            if key == 'header':
                header = value
            elif key == 'file':
                files[value['path']] = Blob(base64.b64decode(value['content']), False)
            elif key == 'lfsFile':
                files[value['path']] = Blob(self.hub.lfs[value['oid']], True)
            elif key == 'deletedFile':
                del files[value['path']]
            elif key == 'deletedFolder':
                files = {p: b for p, b in files.items() if not p.startswith(value['path'].rstrip('/') + '/')}
        if header.get('parentCommit') not in (None, repo.at(revision).oid):
            raise HubReply(412, 'A commit has happened since. Please refresh and try again.')
        user, _ = self._user()
        answer = {}
        if self.query.get('create_pr'):
            number = next(self.hub.pull_requests)
            ref = f'refs/pr/{number}'
            answer = {'pullRequestUrl': f'{self.hub.endpoint}/{repo_id}/discussions/{number}'}
        made = repo.commit(ref, files, header['summary'], str(user))
        return {'commitOid': made.oid, 'commitUrl': f'{self.hub.endpoint}/{repo_id}/commit/{made.oid}', **answer}
