"""Programs that attack the sandbox, the machine or the verdict; docs/sandbox.md shows this table.

In a program `@FOLDER` stands for a folder outside with the file `secret`, `@PID` for a process outside, `@PORT` for an
open port of this machine, `@SOCKET` for the name of an open socket, `@MARK` for a name nothing else has.
"""

import textwrap
from dataclasses import dataclass

from reward_fns.code_tests import CodeTests

ANSWER = "271828"
"""What no program can know."""

PRINTED = CodeTests("stdin", [["", ANSWER]])
CALLED = CodeTests("call", [[[1], int(ANSWER)]], names=["f"])
_CHECKS = f"""
def check(candidate):
    assert abs(candidate(1) - {ANSWER}) < 1e-6
    assert isinstance(candidate(1), int)
    assert candidate(1) == {ANSWER}
    assert not candidate(1) != {ANSWER}
    assert all([candidate(1) == {ANSWER}])
"""
ASSERTED = CodeTests("assert", _CHECKS, names=["f"])

WRONG, ERROR, LATE = "wrong answer", "error", "time-out"


@dataclass(frozen=True)
class Hostile:
    """A program: what it tries, how it may end, its text and the tests it is given."""

    tries: str
    ends: tuple[str, ...]
    text: str
    tests: CodeTests = PRINTED

    @property
    def program(self) -> str:
        return textwrap.dedent(self.text)


PROCESSES = [
    Hostile(
        "fork without end",
        (LATE, ERROR),
        """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """,
    ),
    Hostile(
        "start threads without end",
        (LATE, ERROR),
        """
        import threading, time
        while True:
            try:
                threading.Thread(target=time.sleep, args=(99,)).start()
            except RuntimeError:
                pass
        """,
    ),
    Hostile(
        "a shell's fork bomb",
        (WRONG, LATE, ERROR),
        """
        import subprocess
        subprocess.run(['/bin/sh', '-c', 'b() { b | b & }; b; sleep 9'])
        """,
    ),
    Hostile(
        "leave a daemon of a session of its own",
        (WRONG,),
        """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                while True:
                    time.sleep(1)
            os._exit(0)
        """,
    ),
    Hostile(
        "leave twenty busy children",
        (WRONG, LATE),
        """
        import os
        for _ in range(20):
            if os.fork() == 0:
                while True:
                    pass
        """,
    ),
    Hostile(
        "twenty children that share the processor time",
        (LATE,),
        """
        import os
        for _ in range(20):
            if os.fork() == 0:
                while True:
                    pass
        os.wait()
        """,
    ),
    Hostile(
        "ignore all signals and run on",
        (LATE,),
        """
        import signal
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        while True:
            pass
        """,
    ),
    Hostile(
        "kill every process",
        (WRONG, ERROR),
        """
        import os
        os.kill(-1, 9)
        """,
    ),
    Hostile(
        "kill its parent and its group",
        (WRONG, ERROR),
        """
        try:
            import os
        except BaseException:
            pass
        try:
            os.kill(os.getppid(), 9)
        except BaseException:
            pass
        try:
            os.killpg(0, 9)
        except BaseException:
            pass
        """,
    ),
    Hostile(
        "kill a process outside by its number",
        (WRONG, ERROR),
        """
        import os
        os.kill(@PID, 9)
        """,
    ),
    Hostile(
        "stop itself and sleep",
        (LATE,),
        """
        import os, signal, time
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(10**6)
        """,
    ),
    Hostile(
        "trace a process outside",
        (WRONG,),
        """
        import ctypes
        c = ctypes.CDLL(None, use_errno=True)
        c.ptrace(16, @PID, 0, 0)
        c.ptrace(0, 0, 0, 0)
        """,
    ),
    Hostile(
        "write into the memory of other processes",
        (WRONG, ERROR),
        """
        import ctypes
        c = ctypes.CDLL(None, use_errno=True)
        for pid in (0, 1, @PID):
            c.process_vm_writev(pid, b'x' * 16, 1, b'x' * 16, 1, 0)
        """,
    ),
    Hostile(
        "become a shell that loops",
        (LATE,),
        """
        import os
        os.execv('/bin/sh', ['sh', '-c', 'while :; do :; done'])
        """,
    ),
    Hostile(
        "take the processor with real-time priority",
        (LATE,),
        """
        try:
            import os
        except BaseException:
            pass
        try:
            os.nice(-20)
        except BaseException:
            pass
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99))
        except BaseException:
            pass
        while True:
            pass
        """,
    ),
    Hostile(
        "raise its own limits, then fork",
        (WRONG, ERROR),
        """
        import resource as r
        r.setrlimit(r.RLIMIT_NPROC, (r.RLIM_INFINITY, r.RLIM_INFINITY))
        """,
    ),
    Hostile(
        "change the limits of a process outside",
        (ERROR,),
        """
        import resource as r
        r.prlimit(@PID, r.RLIMIT_NOFILE, (1, 1))
        """,
    ),
]

MEMORY = [
    Hostile(
        "allocate without end",
        (ERROR,),
        """
        kept = []
        while True:
            kept.append(bytearray(2**24))
        """,
    ),
    Hostile(
        "ten children with 200 MiB each",
        (ERROR,),
        """
        import os, time
        for _ in range(10):
            if os.fork() == 0:
                kept = b'x' * (200 * 2**20)
                time.sleep(99)
        time.sleep(99)
        """,
    ),
    Hostile(
        "map shared memory",
        (ERROR,),
        """
        import mmap
        mmap.mmap(-1, 2**30)
        """,
    ),
    Hostile(
        "fill memory files",
        (ERROR,),
        """
        import os
        for number in range(50):
            os.write(os.memfd_create(str(number)), b'x' * 2**24)
        """,
    ),
    Hostile(
        "leave shared memory of System V",
        (WRONG,),
        """
        import ctypes
        c = ctypes.CDLL(None, use_errno=True)
        for key in range(1, 50):
            c.shmat(c.shmget(key, 2**24, 0o1666), None, 0)
        """,
    ),
    Hostile(
        "leave shared memory of POSIX",
        (ERROR,),
        """
        from multiprocessing import shared_memory as m
        kept = [m.SharedMemory('@MARK%d' % n, True, 2**23) for n in range(50)]
        """,
    ),
    Hostile(
        "fill the temporary folder",
        (ERROR,),
        """
        for number in range(1000):
            open('/tmp/@MARK%d' % number, 'wb').write(b'x' * 2**22)
        """,
    ),
    Hostile(
        "a file of a terabyte",
        (ERROR,),
        "open('/tmp/@MARK', 'wb').truncate(2**40)",
    ),
    Hostile(
        "a million empty files",
        (ERROR,),
        """
        for number in range(10**6):
            open('/tmp/@MARK%d' % number, 'w').close()
        """,
    ),
    Hostile(
        "unpack a zip bomb",
        (ERROR, LATE),
        """
        import zlib
        part = zlib.compressobj(9)
        bomb = b''.join(part.compress(bytes(2**20)) for _ in range(600)) + part.flush()
        kept = zlib.decompress(bomb)
        """,
    ),
    Hostile(
        "a power without end",
        (LATE, ERROR),
        "print(9**9**9)",
    ),
    Hostile(
        "a number of a billion digits as text",
        (ERROR, LATE),
        "print('%0999999999d' % 1)",
    ),
    Hostile(
        "recursion without end",
        (ERROR, LATE),
        """
        import sys
        sys.setrecursionlimit(10**9)
        def f(n):
            return f(n + 1) + 1
        f(0)
        """,
    ),
    Hostile(
        "recursion in C",
        (ERROR, LATE),
        """
        import sys
        sys.setrecursionlimit(10**9)
        x = []
        for _ in range(10**6):
            x = [x]
        print(repr(x))
        """,
    ),
    Hostile(
        "lock memory",
        (WRONG,),
        """
        import ctypes
        c = ctypes.CDLL(None, use_errno=True)
        c.mlockall(3)
        """,
    ),
    Hostile(
        "a regular expression without end",
        (LATE,),
        """
        import re
        re.match('(a+)+$', 'a' * 60 + 'b')
        """,
    ),
    Hostile(
        "read address 0",
        (ERROR,),
        """
        import ctypes
        ctypes.string_at(0)
        """,
    ),
]

OUTPUT = [
    Hostile(
        "print without end",
        (ERROR,),
        """
        while True:
            print('x' * 1000)
        """,
    ),
    Hostile(
        "write to stderr for hours",
        (LATE,),
        """
        import sys
        while True:
            print('x' * 1000, file=sys.stderr)
        """,
    ),
    Hostile(
        "print 100 MB at once",
        (ERROR,),
        "print('x' * 10**8)",
    ),
    Hostile(
        "close its output and run on",
        (LATE,),
        """
        import os
        os.close(1)
        while True:
            pass
        """,
    ),
    Hostile(
        "let a child print later",
        (WRONG,),
        """
        import os, time
        if os.fork() == 0:
            time.sleep(0.3)
            print('@MARK')
        """,
    ),
    Hostile(
        "fill pipes",
        (ERROR, LATE),
        """
        import os
        kept = []
        while True:
            kept.append(os.pipe())
            os.set_blocking(kept[-1][1], False)
            os.write(kept[-1][1], b'x' * 2**20)
        """,
    ),
    Hostile(
        "sleep for years",
        (LATE,),
        """
        import time
        time.sleep(10**8)
        """,
    ),
    Hostile(
        "wait for input that never comes",
        (LATE,),
        """
        import os
        os.read(os.pipe()[0], 1)
        """,
    ),
    Hostile(
        "never end at exit",
        (LATE,),
        """
        import atexit
        @atexit.register
        def f():
            while True:
                pass
        """,
    ),
    Hostile(
        "leave a thread that never ends",
        (LATE,),
        """
        import threading, time
        threading.Thread(target=time.sleep, args=(10**6,)).start()
        """,
    ),
]

FILES = [
    Hostile(
        "print a secret of the home folder",
        (ERROR,),
        "print(open('@FOLDER/secret').read())",
    ),
    Hostile(
        "search the file system for it",
        (WRONG, LATE),
        """
        import os
        print([name for _, _, names in os.walk('/') for name in names if name == 'secret'])
        """,
    ),
    Hostile(
        "delete all files",
        (WRONG, LATE),
        """
        import shutil
        shutil.rmtree('/', ignore_errors=True)
        shutil.rmtree('@FOLDER', ignore_errors=True)
        """,
    ),
    Hostile(
        "write outside",
        (WRONG,),
        """
        try:
            open('@FOLDER/@MARK', 'w')
        except BaseException:
            pass
        try:
            open('/usr/@MARK', 'w')
        except BaseException:
            pass
        try:
            open('/@MARK', 'w')
        except BaseException:
            pass
        try:
            open('/etc/@MARK', 'w')
        except BaseException:
            pass
        """,
    ),
    Hostile(
        "write through a symbolic link",
        (ERROR,),
        """
        import os
        os.symlink('@FOLDER/secret', '/tmp/link')
        open('/tmp/link', 'w').write('x')
        """,
    ),
    Hostile(
        "link a file of the system into its folder",
        (ERROR,),
        """
        import os
        os.link('/bin/sh', '/tmp/sh')
        """,
    ),
    Hostile(
        "make a program of the system writable",
        (ERROR,),
        """
        import os
        os.chmod('/bin/sh', 0o777)
        """,
    ),
    Hostile(
        "make a disk's device",
        (ERROR,),
        """
        import os
        os.mknod('/tmp/disk', 0o60666, os.makedev(8, 0))
        """,
    ),
    Hostile(
        "leave by chroot",
        (ERROR,),
        """
        import os
        os.chroot('/tmp')
        """,
    ),
    Hostile(
        "mount and unmount",
        (WRONG,),
        """
        import ctypes
        c = ctypes.CDLL(None, use_errno=True)
        c.mount(b'x', b'/tmp', b'tmpfs', 0, None)
        c.umount2(b'/proc', 2)
        c.umount2(b'/tmp', 2)
        """,
    ),
    Hostile(
        "become root of a user namespace",
        (ERROR,),
        """
        import ctypes
        c = ctypes.CDLL(None, use_errno=True)
        assert c.unshare(0x10000000) == 0 or c.syscall(56, 0x10000011, 0, 0, 0, 0) > 0
        """,
    ),
    Hostile(
        "enter other namespaces",
        (ERROR,),
        """
        import ctypes
        c = ctypes.CDLL(None, use_errno=True)
        import os
        assert c.setns(os.open('/proc/1/ns/mnt', 0), 0) == 0
        os.listdir('@FOLDER')
        """,
    ),
    Hostile(
        "read the environment and files of others in /proc",
        (WRONG,),
        """
        import glob
        for name in glob.glob('/proc/[0-9]*/environ'):
            print(open(name).read())
        print(glob.glob('/proc/[0-9]*/root@FOLDER/*'))
        """,
    ),
    Hostile(
        "overwrite the interpreter",
        (ERROR,),
        "open('/proc/self/exe', 'r+b').write(b'x')",
    ),
    Hostile(
        "give orders to the kernel",
        (WRONG,),
        """
        try:
            open('/proc/sysrq-trigger', 'w').write('b')
        except BaseException:
            pass
        try:
            open('/proc/sys/kernel/core_pattern', 'w').write('|/tmp/x')
        except BaseException:
            pass
        try:
            open('/sys/power/state', 'w').write('mem')
        except BaseException:
            pass
        """,
    ),
    Hostile(
        "read disks and memory by their devices",
        (WRONG,),
        """
        try:
            open('/dev/mem', 'rb')
        except BaseException:
            pass
        try:
            open('/dev/vda', 'rb')
        except BaseException:
            pass
        try:
            open('/dev/sda', 'rb')
        except BaseException:
            pass
        try:
            open('/dev/kmsg', 'rb')
        except BaseException:
            pass
        """,
    ),
    Hostile(
        "become another user",
        (WRONG,),
        """
        try:
            import os, subprocess
        except BaseException:
            pass
        try:
            os.setuid(0)
        except BaseException:
            pass
        try:
            os.setgid(0)
        except BaseException:
            pass
        try:
            subprocess.run(['su', '-c', 'id'])
        except BaseException:
            pass
        """,
    ),
    Hostile(
        "leave its control group",
        (ERROR,),
        "open('/sys/fs/cgroup/cgroup.procs', 'w').write('1')",
    ),
]

NETWORK = [
    Hostile(
        "connect to a port of this machine",
        (ERROR,),
        """
        import socket
        socket.create_connection(('127.0.0.1', @PORT), 1)
        """,
    ),
    Hostile(
        "ask for a name",
        (ERROR,),
        """
        import socket
        socket.getaddrinfo('example.org', 80)
        """,
    ),
    Hostile(
        "connect to a local socket",
        (ERROR,),
        r"""
        import socket
        s = socket.socket(socket.AF_UNIX)
        s.connect('\0@SOCKET')
        s.send(b'@MARK')
        """,
    ),
    Hostile(
        "reach the virtual machine's host",
        (ERROR,),
        """
        import socket
        socket.socket(40, socket.SOCK_STREAM).connect((2, 1024))
        """,
    ),
    Hostile(
        "read raw packets",
        (ERROR,),
        """
        import socket
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        """,
    ),
    Hostile(
        "listen",
        (ERROR,),
        """
        import socket
        s = socket.socket()
        s.bind(('0.0.0.0', 0))
        s.listen()
        s.accept()
        """,
    ),
    Hostile(
        "load programs into the kernel, use its keys and rings",
        (ERROR,),
        """
        import ctypes
        c = ctypes.CDLL(None, use_errno=True)
        key = c.syscall(248, b'user', b'@MARK', b'x', 1, -3)
        assert max(key, c.syscall(321, 0, 0, 0), c.syscall(425, 8, b'x' * 120)) >= 0
        """,
    ),
]

FAKES = [
    Hostile(
        "exit with success before the tests",
        (ERROR,),
        """
        import sys
        sys.exit(0)
        """,
        ASSERTED,
    ),
    Hostile(
        "end the process with success",
        (ERROR,),
        """
        import os
        os._exit(0)
        """,
        ASSERTED,
    ),
    Hostile(
        "exit with success in the tested function",
        (ERROR,),
        """
        import sys
        def f(x):
            sys.exit(0)
        """,
        ASSERTED,
    ),
    Hostile(
        "end the process in the tested function",
        (ERROR,),
        """
        import os
        def f(x):
            os._exit(0)
        """,
        CALLED,
    ),
    Hostile(
        "write the verdict into every open file",
        (ERROR, WRONG, LATE),
        """
        import os
        for number in range(1, 64):
            try:
                os.write(number, b'passed')
            except OSError:
                pass
        def f(x):
            os._exit(0)
        """,
        ASSERTED,
    ),
    Hostile(
        "write the verdict at exit",
        (WRONG, ERROR),
        """
        import atexit, os
        atexit.register(lambda: [os.write(n, b'passed') for n in (1, 3, 4)])
        def f(x):
            return 0
        """,
        ASSERTED,
    ),
    Hostile(
        "return an object that equals everything",
        (ERROR, WRONG),
        """
        class X(int):
            __eq__ = __lt__ = __gt__ = lambda a, b: True
            __ne__ = lambda a, b: False
            __hash__ = int.__hash__
            __sub__ = lambda a, b: a
            __abs__ = lambda a: a
        def f(x):
            return X(0)
        """,
        ASSERTED,
    ),
    Hostile(
        "return an object that is not of a plain type",
        (ERROR,),
        """
        class X:
            __eq__ = __lt__ = __gt__ = __instancecheck__ = lambda a, b: True
            __sub__ = lambda a, b: a
            __abs__ = lambda a: a
        def f(x):
            return X()
        """,
        ASSERTED,
    ),
    Hostile(
        "define the functions that the tests use",
        (WRONG, ERROR),
        """
        abs = lambda x: 0
        isinstance = lambda *x: True
        all = lambda x: True
        def check(candidate):
            pass
        def f(x):
            return 0
        """,
        ASSERTED,
    ),
    Hostile(
        "change Python's built-in functions",
        (WRONG, ERROR),
        """
        import builtins
        builtins.abs = lambda x: 0
        builtins.isinstance = lambda *x: True
        builtins.all = lambda x: True
        builtins.AssertionError = Exception
        def f(x):
            return 0
        """,
        ASSERTED,
    ),
    Hostile(
        "look for the answer in the frames of its callers",
        (WRONG,),
        r"""
        import re, sys
        def f(x):
            frame = sys._getframe()
            while frame:
                found = re.search(r'\) - ([0-9]{6})\)', repr(frame.f_locals) + repr(frame.f_globals))
                if found:
                    return int(found[1])
                frame = frame.f_back
            return 0
        """,
        ASSERTED,
    ),
    Hostile(
        "look for the answer in its own memory",
        (WRONG, ERROR),
        r"""
        import re
        def f(x):
            for line in open('/proc/self/maps'):
                first, last = line.split()[0].split('-')
                try:
                    memory = open('/proc/self/mem', 'rb')
                    memory.seek(int(first, 16))
                    found = re.search(rb'\) - ([0-9]{6})\)', memory.read(int(last, 16) - int(first, 16)))
                except (OSError, OverflowError, ValueError):
                    continue
                if found:
                    return int(found[1])
            return 0
        """,
        ASSERTED,
    ),
    Hostile(
        "forge frames on the socket to the tests",
        (ERROR, WRONG, LATE),
        """
        import os, json, struct
        frame = json.dumps(['value', True]).encode()
        for _ in range(50):
            os.write(3, struct.pack('!I', len(frame)) + frame)
        def f(x):
            return 0
        """,
        ASSERTED,
    ),
    Hostile(
        "send the tests a value of its own type",
        (ERROR, WRONG),
        """
        import json
        json.dumps = lambda value: '["value", {"bytes": 99999999999}]'
        def f(x):
            return 0
        """,
        ASSERTED,
    ),
    Hostile(
        "raise what a failed test raises",
        (ERROR,),
        """
        def f(x):
            raise AssertionError
        """,
        ASSERTED,
    ),
    Hostile(
        "return a number that is not one",
        (WRONG,),
        """
        def f(x):
            return float('nan')
        """,
        ASSERTED,
    ),
    Hostile(
        "bury the tests in a value without end",
        (ERROR, LATE),
        """
        def f(x):
            value = []
            for _ in range(10**5):
                value = [value]
            return value
        """,
        ASSERTED,
    ),
    Hostile(
        "write a result of its own and exit",
        (WRONG, ERROR),
        """
        import os
        def f(x):
            os.write(4, b'true')
            os._exit(0)
        """,
        CALLED,
    ),
    Hostile(
        "return a subclass that equals everything",
        (WRONG,),
        """
        class X(int):
            __eq__ = lambda a, b: True
            __hash__ = int.__hash__
        def f(x):
            return X(0)
        """,
        CALLED,
    ),
    Hostile(
        "print the verdict",
        (WRONG,),
        "print('passed')",
    ),
]

PROGRAMS = {
    "processes": PROCESSES,
    "memory": MEMORY,
    "output and time": OUTPUT,
    "files and rights": FILES,
    "network and kernel": NETWORK,
    "faked verdicts": FAKES,
}
