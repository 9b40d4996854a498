"""The process that runs programs of a model in a sandbox; `reward_fns.code_judge` runs it as a script.

It is a fork server that sees neither programs nor tests. Per run it forks a guard, which reads its request from a
socket of its own, forks the program (`code_program`) and ends it with all its children at the first limit. The guard
counts processor time and memory of all processes of the program together; the kernel bounds each of them.

With `namespaces` the server has its own user, mount, process, network and IPC namespaces and a read-only root of the
system's libraries and Python's. Every run has a further set of them with its own `/tmp`, no capabilities and a list of
refused system calls. With `rlimits` only the limits and that list remain: the program has the rights of this user.

Usage: code_worker.py <socket> <namespaces|rlimits> <folder of this project> <folder of packages...>.
"""

import ctypes
import fcntl
import gc
import json
import os
import platform
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEW_MOUNT, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 1 << 30
NEW_ANY = NEW_MOUNT | NEW_UTS | NEW_IPC | NEW_USER | NEW_PID | NEW_NET | 0x2000000
"""Flags of `clone` for a namespace of any kind."""
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
PDEATHSIG, SET_DUMPABLE, SET_SECCOMP, CAPBSET_DROP, NO_NEW_PRIVS, CHILD_SUBREAPER = 1, 4, 22, 24, 38, 36
USER = 1000
"""User and group inside the sandbox."""
UNUSED_USERS = (1_000_000, 60_000)
"""Programs that root judges run as one of 10,000 users from here on: no limit of processes binds root itself."""
SYSTEM = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/alternatives",
)
DEVICES = ("null", "zero", "full", "random", "urandom")
POLL_SECONDS = 0.02
OPEN_FILES, STACK = 64, 64 * 2**20

# System calls that are refused: name, number on x86_64, on aarch64.
_CALLS = """
socket 41 198, ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, pidfd_getfd 438 438, kcmp 312 272,
memfd_create 319 279, memfd_secret 447 447, shmget 29 194, shmat 30 196, shmctl 31 195, msgget 68 186, semget 64 190,
mq_open 240 180, userfaultfd 323 282, perf_event_open 298 241, bpf 321 280, keyctl 250 219, add_key 248 217,
request_key 249 218, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427, unshare 272 97,
setns 308 268, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, open_tree 428 428, move_mount 429 429,
fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442, kexec_load 246 104,
init_module 175 105, finit_module 313 273, name_to_handle_at 303 264, open_by_handle_at 304 265, personality 135 92,
process_madvise 440 440, syslog 103 116, fanotify_init 300 262, quotactl 179 60, acct 163 89
"""
_MACHINES = {"x86_64": (0xC000003E, 1, 56), "aarch64": (0xC00000B7, 2, 220)}
"""Machine to its audit number, its column above, and its number of `clone`."""
CLONE3 = 435

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    """Call a function of libc.

    Raises:
        OSError: it failed; `filename` is its name.
    """
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """Mount a source at a target, by `mount` of libc."""
    call("mount", source.encode(), target.encode(), kind.encode() if kind else None, flags, data.encode())


# ---------------------------------------------------------------- frames


def send(connection: socket.socket, content: bytes) -> None:
    """Send bytes after their number."""
    connection.sendall(struct.pack("!Q", len(content)) + content)


def receive(connection: socket.socket) -> bytes:
    """Receive what `send` sent.

    Raises:
        EOFError: the other end has closed.
    """
    (size,) = struct.unpack("!Q", _exactly(connection, 8))
    return _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


# ---------------------------------------------------------------- the server's own namespaces


def enter_namespaces(paths: list[str]) -> None:
    """Move into a sandbox; returns in a child, which is process 1 in it.

    Raises:
        OSError: the kernel or the container does not allow it; `filename` is the step.
    """
    outside = os.getuid(), os.getgid()
    unshared, mapped = os.pipe(), os.pipe()
    child = os.fork()
    if child:
        os.close(unshared[1])
        # Only a process outside may map a user who is not its own.
        if os.read(unshared[0], 1):
            _map_users(child, *outside)
            os.write(mapped[1], b"x")
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    call("unshare", NEW_USER)
    os.write(unshared[1], b"x")
    os.close(mapped[1])
    os.read(mapped[0], 1)
    call("unshare", NEW_MOUNT | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS)
    inner = os.fork()
    if inner:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]) & 255)
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    # Opened as the user outside, who may reach them.
    sources = {path: None if _is_link(path) else os.open(path, os.O_PATH) for path in _sources(paths)}
    devices = {name: os.open(f"/dev/{name}", os.O_PATH) for name in DEVICES}
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    call("prctl", SET_DUMPABLE, 1, 0, 0, 0)
    _make_root(sources, devices)
    call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _map_users(child: int, user: int, group: int) -> None:
    """Map `USER` inside to this user, or if this is root to one who owns nothing."""
    ways = [(first + child % 10_000,) * 2 for first in UNUSED_USERS] if user == 0 else []
    Path(f"/proc/{child}/setgroups").write_text("deny", encoding="ascii")
    for number, (to_user, to_group) in enumerate([*ways, (user, group)]):
        try:
            Path(f"/proc/{child}/uid_map").write_text(f"{USER} {to_user} 1", encoding="ascii")
            Path(f"/proc/{child}/gid_map").write_text(f"{USER} {to_group} 1", encoding="ascii")
            return
        except OSError:  # a container that knows fewer users
            if number == len(ways):
                raise


def _sources(paths: list[str]) -> list[str]:
    """List what of the system is visible inside: programs and libraries, and Python's modules."""
    python = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    wanted = [*SYSTEM, *(path for path in (*python, *paths) if path)]
    chosen: list[str] = []
    for path in wanted:
        inside = any(Path(path).is_relative_to(other) and not _is_link(other) for other in chosen)
        if os.path.exists(path) and not inside:
            chosen.append(path)
    return chosen


def _is_link(path: str) -> bool:
    """Return whether a path stays a link inside, as /bin to /usr/bin; a file's target may not be there."""
    return os.path.islink(path) and os.path.isdir(path)


def _make_root(sources: dict[str, int | None], devices: dict[str, int]) -> None:
    """Make a read-only root of the sources and leave everything else behind."""
    root = "/tmp"
    mount("root", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=0755")
    for path, source in sources.items():
        target = Path(root + path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source is None:
            target.symlink_to(os.readlink(path))
        else:
            _bind(source, target)
    for name in ("proc", "tmp", "dev"):
        Path(f"{root}/{name}").mkdir(exist_ok=True)  # Python may lie below /tmp
    for name, source in devices.items():
        _bind(source, Path(f"{root}/dev/{name}"))
    links = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "shm": "/tmp"}
    for name, to in (links | {"stderr": "/proc/self/fd/2"}).items():
        os.symlink(to, f"{root}/dev/{name}")
    recursive, read_only = 0x8000, struct.pack("QQQQ", 0x1 | 0x2, 0, 0, 0)
    if libc.syscall(442, -100, root.encode(), recursive, read_only, len(read_only)) != 0:  # mount_setattr
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "mount_setattr")
    # A run may mount its own only where one is visible that restricts no more.
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", 2)
    os.chdir("/")


def _bind(source: int, target: Path) -> None:
    if os.path.isdir(f"/proc/self/fd/{source}"):
        target.mkdir()
    else:
        target.touch()
    mount(f"/proc/self/fd/{source}", str(target), None, MS_BIND | MS_REC)
    os.close(source)


# ---------------------------------------------------------------- one run


@dataclass(frozen=True)
class Limits:
    """Limits of one run.

    Attributes:
        seconds: processor time of all processes together; in the role "call" from one result to the next.
        wall_seconds: wall-clock time, in the same way.
        all_seconds, all_wall_seconds: of the whole run.
        memory: bytes beyond those of an idle interpreter, of each process and of all together.
        processes: processes and threads.
        output, files: bytes of output, and of all files in `/tmp`.
    """

    seconds: float
    wall_seconds: float
    all_seconds: float
    all_wall_seconds: float
    memory: int
    processes: int
    output: int
    files: int


class Guard:
    """Runs one program and ends it at the first limit."""

    def __init__(self, connection: socket.socket, link: int | None, namespaces: bool) -> None:
        self.connection, self.link, self.namespaces = connection, link, namespaces
        self.request: dict[str, Any] = json.loads(receive(connection))
        self.limits = Limits(**self.request["limits"])
        # What a fork has from the start; it is not the program's.
        size, resident, shared = (int(number) for number in _read("/proc/self/statm").split()[:3])
        self.address_space, self.own = size * resource.getpagesize(), resident - shared
        self.folder = "/tmp" if namespaces else tempfile.mkdtemp(prefix="skpo-code-")
        self.output = bytearray()

    def run(self) -> None:
        """Run the program and send how it ended, and its output."""
        try:
            end, code, cpu, fault = self._run()
        except OSError as error:
            end, code, cpu, fault = "fault", 0, 0.0, f"{error.filename}: {error.strerror}"
        finally:
            if not self.namespaces:
                shutil.rmtree(self.folder, ignore_errors=True)
        send(self.connection, json.dumps({"end": end, "code": code, "cpu": cpu, "fault": fault}).encode())
        send(self.connection, bytes(self.output))

    def _run(self) -> tuple[str, int, float, str]:
        given = self._standard_input()
        out, ready = os.pipe(), os.pipe()
        if self.namespaces:
            call("unshare", NEW_USER | NEW_MOUNT | NEW_PID | NEW_IPC)
        else:
            call("prctl", CHILD_SUBREAPER, 1, 0, 0, 0)
        child = os.fork()
        if child == 0:
            self._become_program(given, out[1], ready[1])
        for descriptor in (given, out[1], ready[1], self.link):
            if descriptor is not None:
                os.close(descriptor)
        fault = b"".join(iter(lambda: os.read(ready[0], 4096), b""))
        if fault != b"ready":
            os.waitpid(child, 0)
            return "fault", 0, 0.0, fault.decode("utf-8", "replace") or "the program could not be started"
        end, cpu = self._watch(child, out[0])
        code = self._end(child)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        os.set_blocking(out[0], False)
        while end == "exited" and self._read_output(out[0]):
            if len(self.output) > self.limits.output:
                end = "output"
        return end, code, max(cpu, used.ru_utime + used.ru_stime), ""

    def _standard_input(self) -> int:
        """Return a descriptor from which the request's `stdin` can only be read."""
        written = os.memfd_create("stdin")
        with os.fdopen(written, "wb") as file:
            file.write(self.request.get("stdin", "").encode("utf-8", "replace"))
            file.flush()
            return os.open(f"/proc/self/fd/{written}", os.O_RDONLY)

    def _watch(self, child: int, out: int) -> tuple[str, float]:
        """Wait for the end of the program, or for a limit; returns which, and the seconds of processor time."""
        poll = select.poll()
        ended = os.pidfd_open(child)
        for descriptor in (ended, out, self.connection.fileno()):
            poll.register(descriptor, select.POLLIN)
        limits, cpu, begun, wait = self.limits, 0.0, 0.0, 0.002
        end = time.monotonic() + limits.all_wall_seconds
        deadline = time.monotonic() + limits.wall_seconds
        while True:
            events = {descriptor for descriptor, _ in poll.poll(1000 * wait)}
            wait = min(2 * wait, POLL_SECONDS)
            if out in events and not self._read_output(out):
                poll.unregister(out)
            if len(self.output) > limits.output:
                return "output", cpu
            if self.connection.fileno() in events:
                return "abandoned", cpu
            if ended in events:
                return "exited", cpu
            now, memory = self._used(child)
            cpu = max(cpu, now)
            if out in events and self.request["role"] == "call":
                begun, deadline = cpu, time.monotonic() + limits.wall_seconds
            late = time.monotonic() > min(deadline, end)
            if late or cpu - begun > limits.seconds or cpu > limits.all_seconds:
                return "time", cpu
            if memory > limits.memory:
                return "memory", cpu

    def _read_output(self, out: int) -> bool:
        """Read some output; False at its end."""
        try:
            part = os.read(out, 1 << 20)
        except BlockingIOError:
            return False
        self.output += part
        return bool(part)

    def _used(self, child: int) -> tuple[float, int]:
        """Return processor time in seconds and memory in bytes of the program's processes together."""
        # With namespaces /proc shows these processes alone.
        pids = [name for name in os.listdir("/proc") if name.isdigit()] if self.namespaces else [str(child)]
        ticks = pages = 0
        for pid in pids:
            try:
                fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
                resident, shared = (int(number) for number in _read(f"/proc/{pid}/statm").split()[1:3])
            except (OSError, ValueError):  # it has just ended
                continue
            ticks += sum(int(number) for number in fields[11:15])
            pages += max(0, resident - shared - self.own)
        return ticks / os.sysconf("SC_CLK_TCK"), pages * resource.getpagesize()

    def _end(self, child: int) -> int:
        """Kill what is left of the program and return the exit code of its first process."""
        signal.pidfd_send_signal(os.pidfd_open(child), signal.SIGKILL)
        # With namespaces it is process 1 of its own: the kernel ends all others before it can be waited for.
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        until = time.monotonic() + 5
        while not self.namespaces and time.monotonic() < until:
            orphans = _read(f"/proc/self/task/{os.getpid()}/children").split()
            if not orphans:
                break
            for pid in map(int, orphans):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return code

    def _become_program(self, given: int, out: int, ready: int) -> None:
        """Confine this process and run the program in it; does not return."""
        code = 1
        try:
            nothing = os.open(os.devnull, os.O_RDWR)
            # 0, 1 and 2 are the standard streams, 3 is a link to the other process of a test, 4 takes a result.
            shown = out if self.request["role"] == "stdin" else nothing
            places = [given, shown, nothing, nothing if self.link is None else self.link, out, ready]
            above = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 64) for descriptor in places]
            for place, descriptor in enumerate(above):
                os.dup2(descriptor, place)
            ready = len(places) - 1
            os.closerange(len(places), 256)
            try:
                self._confine()
            except OSError as error:
                os.write(ready, f"{error.filename}: {error.strerror}".encode())
                return
            os.write(ready, b"ready")
            os.close(ready)
            code = code_program.run(self.request)
        finally:
            os._exit(code)

    def _confine(self) -> None:
        limits = self.limits
        if self.namespaces:
            mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
            maps = {"setgroups": "deny", "uid_map": f"{USER} {USER} 1", "gid_map": f"{USER} {USER} 1"}
            for name, line in maps.items():
                Path(f"/proc/self/{name}").write_text(line, encoding="utf-8")
            python = {name: os.open(f"/tmp/{name}", os.O_PATH) for name in os.listdir("/tmp")}
            mount("tmp", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={limits.files},nr_inodes=1000,mode=0700")
            for name, source in python.items():
                _bind(source, Path("/tmp", name))
        os.chdir(self.folder)
        os.environ.update(HOME=self.folder, TMPDIR=self.folder)
        os.setsid()
        os.umask(0o077)
        for kind, amount in {
            resource.RLIMIT_CPU: int(limits.all_seconds) + 2,
            resource.RLIMIT_AS: self.address_space + limits.memory,
            resource.RLIMIT_NPROC: limits.processes + (0 if self.namespaces else _tasks_of_user()),
            resource.RLIMIT_FSIZE: limits.files,
            resource.RLIMIT_NOFILE: OPEN_FILES,
            resource.RLIMIT_STACK: STACK,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
        }.items():
            hard = resource.getrlimit(kind)[1]
            amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
            resource.setrlimit(kind, (amount, amount))
        _drop_privileges(self.namespaces)


def _tasks_of_user() -> int:
    """Count this user's threads: without a user namespace the limit of processes is for all of them."""
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            count += len(os.listdir(f"/proc/{pid}/task")) if os.stat(f"/proc/{pid}").st_uid == os.getuid() else 0
        except OSError:  # it has just ended
            pass
    return count


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _drop_privileges(namespaces: bool) -> None:
    """Give up all capabilities for good, and the system calls of `_CALLS`."""
    if namespaces:
        for capability in range(64):
            libc.prctl(CAPBSET_DROP, capability, 0, 0, 0)
    call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    if namespaces:
        call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    program = _filter(platform.machine())
    if program:
        buffer = ctypes.create_string_buffer(program)
        header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
        call("prctl", SET_SECCOMP, 2, header, 0, 0)


def refused_calls(column: int = 1) -> list[int]:
    """Return the numbers of the system calls that are refused, of a column of `_CALLS`."""
    return [int(entry.split()[column]) for entry in _CALLS.split(",")]


def _filter(machine: str) -> bytes:
    """Return the seccomp filter, empty for a machine whose numbers are not known."""
    if machine not in _MACHINES:
        return b""
    audit, column, clone = _MACHINES[machine]
    load, equal, above, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, errno, kill = 0x7FFF0000, 0x00050000, 0x80000000

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    steps = [step(load, 4), step(equal, audit, 1, 0), step(give, kill), step(load, 0)]
    steps += [step(above, 0x40000000, 0, 1), step(give, errno | 1)]  # the calls of x32
    steps += [step(equal, CLONE3, 0, 1), step(give, errno | 38)]  # libc then takes clone, whose flags can be read
    for number in refused_calls(column):
        steps += [step(equal, number, 0, 1), step(give, errno | 1)]
    steps += [step(equal, clone, 0, 3), step(load, 16), step(bits, NEW_ANY, 0, 1), step(give, errno | 1)]
    return b"".join([*steps, step(give, allow)])


# ---------------------------------------------------------------- the server


def serve(control: socket.socket, namespaces: bool) -> None:
    """Fork a guard for every message, which brings its descriptors; returns when the other end has closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for guards
    gc.freeze()  # a collection in a fork would copy all pages
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 16, 2)
        if not message:
            return
        if message == b"numpy" and "numpy" not in sys.modules:
            import numpy  # noqa: F401  # forks have it at once
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            link = descriptors[1] if len(descriptors) > 1 else None
            try:
                Guard(socket.socket(fileno=descriptors[0]), link, namespaces).run()
            except (OSError, EOFError):
                pass  # the client has gone
            finally:
                os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def main(number: int, mode: str, paths: list[str]) -> int:
    """Enter the sandbox and serve."""
    control = socket.socket(fileno=number)
    try:
        if mode == "namespaces":
            enter_namespaces(paths)
        code_program.preload()
    except OSError as error:
        control.send(f"{error.filename}: {error.strerror}".encode())
        return 1
    control.send(b"ready")
    serve(control, mode == "namespaces")
    return 0


if __name__ == "__main__":
    # Last in the path: this project's modules must not hide anyone else's.
    sys.path += sys.argv[3:]
    from reward_fns import code_program

    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[4:]))
