"""A real SLURM of several nodes on this machine, thrown away after use; for tests, and by hand from a shell.

    python tests/cluster.py up|down|env|status|kill NODE|start NODE|packages

The daemons, the scheduler, requeueing, preemption, time limits and accounting are SLURM's own. Only the hardware is
pretended: a node claims more CPUs, memory and GPUs than there are. Needs root on Debian 12 (SLURM 22.05).

All daemons live in one set of namespaces, the site, and every node in a set of its own inside it: it has its own
processes, address, host name and /dev/shm. One cable leads from the site to this machine. When the first process of
the site ends, for whatever reason, the kernel ends all others, unmounts what was mounted and removes the network.
Where namespaces are not permitted, the nodes are plain processes that share this machine's network and host name.

Every process carries the cluster's folder and its node's name in its environment, as the path of SLURM_CONF; that is
how they are found again, also by another program.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

# What is run, and the Debian package that holds it.
PACKAGES = {
    "ip": "iproute2",
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "slurmdbd": "slurmdbd",
    "mariadb-install-db": "mariadb-server-core",
    "my_print_defaults": "mariadb-client-core",  # mariadb-install-db runs it
}
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
CPUS, MEMORY, GPUS = 64, 256_000, 8  # of a node; MB

TAKES_JOBS = r"(IDLE|MIXED|ALLOCATED)(\+COMPLETING|\+PLANNED)* "
UNSHARE = "unshare --fork --kill-child --pid --uts --ipc --mount --mount-proc"

SITE = """
hostname controller
mount --bind {hosts} /etc/hosts
mount -t tmpfs tmpfs /run
ip link set lo up
ip link add nodes type bridge
ip link set nodes up
echo ready
sleep infinity & wait
"""

NODE = """
ip netns add {name}
ip link add {name} master nodes up type veth peer name eth0 netns {name}
exec nsenter --net=/run/netns/{name} {unshare} sh -ec '
    hostname {name}
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    ip link set lo up
    ip address add {address}/24 dev eth0
    ip link set eth0 up
    # a first process must reap orphans, which a waiting shell does
    slurmd -D -N {name} & wait'
"""

SLURM_CONF = """
ClusterName=test
SlurmctldHost={controller}({address})
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
# A job's credential counts as used for cred_expire seconds, and a requeued job waits as long: 120 by default.
AuthInfo=socket={folder}/var/munge.socket,cred_expire=15
StateSaveLocation={folder}/var/state
SlurmdSpoolDir={folder}/var/%n
SlurmctldPidFile={folder}/var/slurmctld.pid
SlurmdPidFile={folder}/var/%n.pid
MailProg=/bin/true

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={address}
AccountingStoragePort={ports[1]}
AccountingStoragePass={folder}/var/munge.socket
AccountingStorageTRES=gres/gpu

# No cgroups, which differ from machine to machine: a job's processes are known by their parents, and not confined.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none

# The nodes have what is written here. A job that asks for no memory gets its CPUs' share, not the whole node.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU={memory_per_cpu}
GresTypes=gpu

# A requeued job is looked at again within seconds of its time; by default every 30 (backfill) or 60 seconds.
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=3,sched_interval=3,batch_sched_delay=0

# Jobs of a partition with a higher tier take the nodes of those in one that may be preempted, which then get the
# signal that they asked for by --signal, not SIGTERM alone.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal

# Seconds. A silent node is dead after 20 (300 by default), which a busy machine of two cores does not reach by being
# slow; it may take jobs again as soon as it is back. A job has 10 between SIGTERM and SIGKILL (30). A message may take
# longer than usual (10), and so may the start of a job's script (10), since all nodes share the machine's cores. A
# preempted job has a GraceTime of 30 after its signal, for a checkpoint; sites give minutes.
SlurmdTimeout=20
ReturnToService=2
KillWait=10
MessageTimeout=20
BatchStartTimeout=60

{nodes}

# As people find it: no preemption in the default partition, neither of its jobs nor by them.
PartitionName=main    Nodes={cpu_names} PriorityTier=1 PreemptMode=OFF Default=YES
PartitionName=preempt Nodes={cpu_names} PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent  Nodes={cpu_names} PriorityTier=2 PreemptMode=OFF
"""

SLURMDBD_CONF = """
DbdHost={controller}
DbdAddr={address}
DbdPort={ports[1]}
SlurmUser=root
AuthInfo=socket={folder}/var/munge.socket
PidFile={folder}/var/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageUser=root
"""


class Cluster:
    """A cluster in a folder, up inside `with`; it also ends if this process does, be it by SIGKILL.

    Args:
        folder: for all state; absolute, short (sockets lie in it), empty or a former cluster's. Its logs stay.
        nodes: node1, node2, ... in the partitions main (the default), preempt, and urgent, which preempts preempt.
        gpu_nodes: gpu1, gpu2, ... in the partition gpu, with eight GPUs each that are /dev/null.

    RuntimeError where there can be none: see `require`.
    """

    def __init__(self, folder: Path | str, *, nodes: int = 4, gpu_nodes: int = 0) -> None:
        if obstacle := self.obstacle():
            raise RuntimeError(obstacle)
        self.folder = Path(folder)
        self._cpu_names = [f"node{number}" for number in range(1, nodes + 1)]
        self._gpu_names = [f"gpu{number}" for number in range(1, gpu_nodes + 1)]
        self._names = [*self._cpu_names, *self._gpu_names]
        self._etc, self._var, self._log = (self.folder / name for name in ("etc", "var", "log"))
        self._leash: list[str] = []
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        if not re.fullmatch(r"/[\w./-]{1,60}", str(folder)):
            raise ValueError(f"the folder {folder} must be an absolute path of at most 60 plain characters")
        if not 1 <= nodes <= 100 or not 0 <= gpu_nodes <= 100:
            raise ValueError(f"{nodes} nodes and {gpu_nodes} with GPUs: needed are 1 to 100, and 0 to 100")

    @staticmethod
    def missing() -> list[str]:
        """The Debian packages that a cluster needs and this machine has not."""
        return sorted({package for command, package in PACKAGES.items() if not shutil.which(command, path=PATH)})

    @classmethod
    def obstacle(cls) -> str:
        """Why there can be no cluster here and what to do about it; empty if there can."""
        if missing := cls.missing():
            return f"a SLURM cluster needs: apt-get install --no-install-recommends {' '.join(missing)}"
        return "" if os.geteuid() == 0 else "a SLURM cluster needs root: run this as root"

    @classmethod
    def require(cls) -> None:
        """Skip the test that calls this where there can be no cluster; with CI=true that is a RuntimeError."""
        if obstacle := cls.obstacle():
            if os.environ.get("CI") == "true":
                raise RuntimeError(obstacle)
            import pytest

            pytest.skip(obstacle)

    @property
    def environment(self) -> dict[str, str]:
        """What points SLURM's commands, and programs that run them, to this cluster."""
        return {"SLURM_CONF": str(self._etc / "slurm.conf")}

    def __enter__(self) -> Cluster:
        # the thread that enters must live as long as the cluster: its end is what is listened for
        self._leash = ["setpriv", "--pdeathsig", "KILL"]
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self) -> None:
        """Start everything and wait until all nodes take jobs. RuntimeError or TimeoutError if that fails."""
        if self._processes():
            raise RuntimeError(f"the cluster in {self.folder} is up: take it down first")
        self.folder.mkdir(parents=True, exist_ok=True)
        if strangers := {path.name for path in self.folder.iterdir()} - {"etc", "var", "log"}:
            raise ValueError(f"{self.folder} holds {', '.join(sorted(strangers))}: a cluster needs an empty folder")
        for path in (self._etc, self._var, self._log):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        with ExitStack() as failing:
            failing.callback(self.down)
            self._configure(self._isolate() or self._share())
            self._start_controller()
            self.start(*self._names)
            failing.pop_all()

    def down(self) -> None:
        """End every process of the cluster and discard its state, but not its logs."""
        if self._site():
            _run("ip link delete machine", self._inside())
        self._end("*")
        _rewrite_hosts(self.folder)
        shutil.rmtree(self._etc, ignore_errors=True)
        shutil.rmtree(self._var, ignore_errors=True)

    def kill(self, node: str) -> None:
        """A power cut: the node's network is gone, then all its processes at once; nothing says goodbye."""
        self._check(node)
        for command in (f"ip link delete {node}", f"ip netns delete {node}") if self._site() else ():
            with suppress(RuntimeError):  # it has none if it is off
                _run(command, self._inside())
        self._end(node)

    def start(self, *nodes: str) -> None:
        """Power on; returns when the nodes take jobs. As with a real one's boot, SLURM has missed them before that."""
        for node in nodes:
            self._check(node)
            if self._processes(node):
                raise ValueError(f"{node} is running: kill it first")
            self.kill(node)  # what is left where slurmd ended by itself
            # back sooner, its jobs would count as running still, and hang
            self._wait(node, partial(self._is_seen, node, "DOWN|UNKNOWN"))
            (self._var / node).mkdir(exist_ok=True)
            script = NODE.format(name=node, address=self._addresses()[node], unshare=UNSHARE)
            self._spawn(node, ["sh", "-ec", script] if self._site() else ["slurmd", "-D", "-N", node])
        for node in nodes:
            self._wait(node, partial(self._is_seen, node, TAKES_JOBS))

    def processes(self, node: str) -> dict[int, str]:
        """The processes of jobs in the node: their ids as this machine counts them, and their command lines."""
        self._check(node)
        jobs = [pid for pid in self._processes(node) if "SLURM_JOB_ID" in _environ(pid)]
        return {pid: _read(pid, "cmdline").replace("\0", " ").strip() for pid in jobs}

    def status(self) -> str:
        """What runs, and what SLURM says of nodes and jobs."""
        running = [
            name
            for name in ("munged", "mariadbd", "slurmdbd", "slurmctld", *self._addresses())
            if self._processes(name)
        ]
        if not running:
            return f"{self.folder}: down"
        network = "each node in namespaces of its own" if self._site() else "nodes share this machine's network"
        says = [self._ask("sinfo", "-N", "-o", "%8N %9P %12T %14C %G"), self._ask("squeue")]
        return "\n".join([f"{self.folder}: {network}; running: {' '.join(running)}", *says])

    def _isolate(self) -> dict[str, str]:
        """Make the site and its cable to this machine; returns the addresses, none where that is not permitted."""
        (self._etc / "hosts").touch()
        script = SITE.format(hosts=self._etc / "hosts")
        site = self._spawn("site", [*UNSHARE.split(), "--net", "sh", "-ec", script], stdout=subprocess.PIPE)
        assert site.stdout
        with site.stdout:
            if site.stdout.readline() != b"ready\n":
                return {}
        # 198.18.0.0/15 is reserved for tests. Clusters run side by side: who makes the link has its number.
        for number in range(256):
            link, subnet = f"slurm{number}", f"198.19.{number}"
            with suppress(RuntimeError):
                _run(f"ip link add {link} type veth peer name machine netns {site.pid}")
                break
        else:
            raise RuntimeError("the cluster needs one of the network links slurm0 to slurm255: all are taken")
        _run(f"ip address add {subnet}.254/24 dev {link}")
        _run(f"ip link set {link} up")
        _run("ip link set machine master nodes up", self._inside())
        _run(f"ip address add {subnet}.253/24 dev nodes", self._inside())
        return {"controller": f"{subnet}.253"} | {name: f"{subnet}.{k}" for k, name in enumerate(self._names, 1)}

    def _share(self) -> dict[str, str]:
        """The addresses where nodes are plain processes; their names go to /etc/hosts until `down`."""
        reason = (self._log / "site.log").read_text().strip()
        print(f"no namespaces here ({reason}): the nodes share this machine's network and host name", file=sys.stderr)
        _rewrite_hosts(self.folder, self._names)
        return dict.fromkeys(["controller", *self._names], "127.0.0.1")

    def _site(self) -> int | None:
        """The first process of the site, which counts itself as 1."""
        first = [pid for pid in self._processes("site") if re.search(r"NSpid:.*\t1\n", _read(pid, "status"))]
        return first[0] if first else None

    def _inside(self) -> list[str]:
        """What runs a command in the site, if there is one."""
        site = self._site()
        return f"nsenter --target {site} --pid --net --uts --ipc --mount".split() if site else []

    def _spawn(self, name: str, command: list[str], stdout: int | None = None) -> subprocess.Popen[bytes]:
        with suppress(FileExistsError):
            (self._etc / name).symlink_to(".")
        with (self._log / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                [*self._leash, *self._inside(), *command],
                env={
                    "PATH": PATH,
                    "SLURM_CONF": str(self._etc / name / "slurm.conf"),
                    "MYSQL_UNIX_PORT": str(self._var / "mariadb.socket"),  # how slurmdbd finds its database
                },
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=stdout or log,
                stderr=log,
                start_new_session=True,
            )
        self._children[name] = child
        return child

    def _processes(self, name: str = "*") -> list[int]:
        """The living processes of a daemon or node, or of all: parents first."""
        path = str(self._etc / name / "slurm.conf")
        pids = sorted(int(entry) for entry in os.listdir("/proc") if entry.isdecimal())
        return [pid for pid in pids if fnmatchcase(_environ(pid).get("SLURM_CONF", ""), path)]

    def _end(self, name: str) -> None:
        def gone() -> bool:
            pids = self._processes(name)
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        self._wait("the end of all processes", gone)
        for each in [each for each in self._children if fnmatchcase(each, name)]:
            self._children.pop(each).wait()

    def _addresses(self) -> dict[str, str]:
        """Of the controller and the nodes, as the cluster was made."""
        with suppress(FileNotFoundError):
            lines = (self._etc / "hosts").read_text().splitlines()
            return {name: address for address, name in map(str.split, lines) if name != "localhost"}
        return {}

    def _check(self, node: str) -> None:
        known = [name for name in self._addresses() if name != "controller"]
        if node not in known:
            raise ValueError(f"no node {node} in the cluster in {self.folder}, which has: {' '.join(known) or 'none'}")

    def _ask(self, *command: str) -> str:
        """What one of SLURM's commands says; nothing if it fails."""
        environment = os.environ | self.environment | {"PATH": PATH}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return "" if done.returncode else done.stdout

    def _wait(self, name: str, ready: Callable[[], object], seconds: float = 120) -> None:
        began, child = time.monotonic(), self._children.get(name)
        while not ready():
            if time.monotonic() > began + seconds or (child and child.poll() is not None):
                logs = [f"{path}:\n{path.read_text()[-2000:]}" for path in sorted(self._log.glob(f"{name}*"))]
                waited = f"{name} is not ready after {time.monotonic() - began:.0f} s"
                raise TimeoutError("\n".join([waited, *logs]))
            time.sleep(0.1)

    def _is_seen(self, node: str, states: str) -> bool:
        """Whether SLURM believes the node to be in one of the states."""
        return bool(re.search(rf" State=({states})", self._ask("scontrol", "--oneliner", "show", "node", node)))

    def _configure(self, addresses: dict[str, str]) -> None:
        controller = "controller" if self._site() else socket.gethostname().split(".")[0]
        ports = _free_ports(2 + len(self._names))
        nodes = []
        for name, port in zip(self._names, ports[2:], strict=True):
            host = name if self._site() else controller
            gpus = f"Gres=gpu:{GPUS}" if name in self._gpu_names else ""
            nodes.append(
                f"NodeName={name} NodeHostname={host} NodeAddr={addresses[name]} Port={port} "
                f"Sockets=2 CoresPerSocket={CPUS // 2} ThreadsPerCore=1 RealMemory={MEMORY} {gpus}"
            )
        gres = ""
        if self._gpu_names:
            nodes.append(f"PartitionName=gpu Nodes={','.join(self._gpu_names)}")
            # SLURM counts GPUs, and sets CUDA_VISIBLE_DEVICES, by their device files
            gres = f"NodeName={','.join(self._gpu_names)} Name=gpu File={self._var}/nvidia[0-{GPUS - 1}]\n"
            for gpu in range(GPUS):
                (self._var / f"nvidia{gpu}").symlink_to("/dev/null")
        values = {
            "folder": self.folder,
            "controller": controller,
            "address": addresses["controller"],
            "ports": ports,
            "memory_per_cpu": MEMORY // CPUS,
            "nodes": "\n".join(nodes),
            "cpu_names": ",".join(self._cpu_names),
        }
        (self._etc / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
        )
        (self._etc / "gres.conf").write_text(gres)
        (self._etc / "slurm.conf").write_text(SLURM_CONF.format(**values))
        (self._etc / "slurmdbd.conf").touch(mode=0o600)
        (self._etc / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**values))

    def _start_controller(self) -> None:
        var = self._var
        (var / "munge.key").touch(mode=0o600)
        (var / "munge.key").write_bytes(os.urandom(1024))
        # forced: to accept a folder inside one that all may write, such as /tmp
        munged = ["munged", "--foreground", "--force", f"--socket={var}/munge.socket"]
        self._spawn(
            "munged", [*munged, *(f"--{kind}-file={var}/munge.{kind}" for kind in ("key", "pid", "seed", "log"))]
        )
        database = ["--no-defaults", "--user=root", f"--datadir={var}/db", "--innodb-log-file-size=4M"]
        install = ["mariadb-install-db", *database, "--auth-root-authentication-method=normal", "--skip-test-db"]
        self._spawn("mariadb-install-db", install).wait()
        # nothing in it needs to survive: no waiting for the disk
        database += ["--skip-networking", "--innodb-flush-log-at-trx-commit=0"]
        database += [f"--socket={var}/mariadb.socket", f"--pid-file={var}/mariadb.pid"]
        self._spawn("mariadbd", ["mariadbd", *database])
        self._wait("munged", (var / "munge.socket").exists)
        self._wait("mariadbd", (var / "mariadb.socket").exists)
        self._spawn("slurmdbd", ["slurmdbd", "-D"])
        self._wait("slurmdbd", lambda: self._ask("sacctmgr", "--immediate", "add", "cluster", "test"))
        self._spawn("slurmctld", ["slurmctld", "-D"])
        self._wait("slurmctld", lambda: "UP" in self._ask("scontrol", "ping"))


def _run(command: str, inside: Sequence[str] = ()) -> None:
    environment = os.environ | {"PATH": PATH}
    done = subprocess.run([*inside, *command.split()], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")


def _read(pid: int, name: str) -> str:
    """A file of /proc about a process; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _environ(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    return dict(pair.split("=", 1) for pair in _read(pid, "environ").split("\0") if "=" in pair)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def _rewrite_hosts(folder: Path, names: Sequence[str] = ()) -> None:
    """Put the names into this machine's /etc/hosts, or with none take out those of the cluster in the folder."""
    path, mark = Path("/etc/hosts"), f"# SLURM in {folder}\n"
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.endswith(mark)]
    if names:
        kept.append(f"127.0.0.1 {' '.join(names)} {mark}")
    if kept != lines:
        path.write_text("".join(kept))  # in place: in a container it is a mount point


def main() -> None:
    """What a contributor types."""
    parser = argparse.ArgumentParser(description="A real SLURM on this machine, for tests.")
    parser.add_argument("--folder", default="/tmp/convmae-slurm", help="of the cluster (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start the cluster")
    up.add_argument("--nodes", type=int, default=4, help="nodes without GPUs (default: 4)")
    up.add_argument("--gpu-nodes", type=int, default=1, help="nodes with pretended GPUs (default: 1)")
    commands.add_parser("down", help="end the cluster, or what is left of it")
    commands.add_parser("env", help="print the line for a shell that points SLURM's commands here")
    commands.add_parser("status", help="show daemons, nodes and jobs")
    commands.add_parser("packages", help="print the Debian packages that are missing")
    commands.add_parser("kill", help="cut the power of a node").add_argument("node")
    commands.add_parser("start", help="power on a node").add_argument("node")
    asked = parser.parse_args()
    try:
        if asked.command == "packages":
            print(*Cluster.missing())
            return
        cluster = Cluster(asked.folder, nodes=getattr(asked, "nodes", 4), gpu_nodes=getattr(asked, "gpu_nodes", 0))
        if asked.command == "up":
            cluster.up()
        elif asked.command == "down":
            cluster.down()
        elif asked.command == "kill":
            cluster.kill(asked.node)
        elif asked.command == "start":
            cluster.start(asked.node)
        if asked.command in ("up", "env"):
            print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}")
        if asked.command == "status":
            print(cluster.status())
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
