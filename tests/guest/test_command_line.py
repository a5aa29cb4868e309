"""The destination's command line: what is dropped, replaced, refused and kept."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from vmferry.errors import Refused
from vmferry.guest.commandline import SOCKET_PATH_MAX_BYTES, Places, Rewritten, rewrite
from vmferry.guest.options import Settings, qmp_sockets

DIR = Path("/run/vf/m1")
ENDING = f"-qmp unix:{DIR}/vmferry.qmp,server=on,wait=off -incoming defer -S"


def rewritten(words: str, places: Places | None = None) -> Rewritten:
    return rewrite(["qemu", *shlex.split(words)], places or Places(DIR))


def between(result: Rewritten) -> str:
    """What stands between the program and the ending."""
    ending = shlex.split(ENDING)
    assert result.argv[0] == "qemu"
    assert result.argv[-len(ending) :] == ending
    return shlex.join(result.argv[1 : -len(ending)])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # Left out.
        ("-daemonize -m 64", "-m 64"),
        ("-S -m 64 -incoming tcp:0:4444 --S", "-m 64"),
        ("-loadvm snap -m 64", "-m 64"),
        # Kept, known or not; values that look like options are no options.
        ("-name vm -uuid 1-2 -smbios type=1 -sandbox on", None),
        ("-append -S -kernel k", None),
        ("disk.img -no-reboot -frobnicate 7 --frobnicate=7 -x -", None),
        ("-new-switch -daemonize -newer-switch -S -m 64", "-new-switch -newer-switch -m 64"),
        ("-monitor stdio -serial mon:stdio -serial null -parallel none", None),
        ("-vnc :1 -gdb tcp::1234 -s -qmp tcp:127.0.0.1:4000,server=on", None),
        ("-netdev user,id=n -netdev bridge,id=b,br=br0 -nic none", None),
        ("-chardev pty,id=p -chardev socket,id=c,path=/run/swtpm", None),
        ("-chardev socket,id=t,host=localhost,port=1,server=on", None),
        ("-object rng-random,id=r,filename=/dev/urandom", None),
        ("-object memory-backend-ram,id=m,size=1G", None),
        ("-object memory-backend-file,id=m,size=1M,mem-path=/rom,readonly=on", None),
        ("-object memory-backend-file,id=m,size=1G,mem-path=/dev/hugepages", None),
        ("-mem-path /dev/hugepages", None),
        # Monitors and other sockets.
        (
            "-qmp unix:/run/a.sock,server,nowait",
            f"-qmp unix:{DIR}/qmp-1.sock,server=on,wait=off",
        ),
        (
            "-qmp unix:a,server=on -qmp-pretty unix:path=b,server=on",
            f"-qmp unix:{DIR}/qmp-1.sock,server=on "
            f"-qmp-pretty unix:{DIR}/qmp-pretty-1.sock,server=on",
        ),
        (
            "-monitor unix:/run/m,server=on,wait=off -serial mon:unix:s,server=on",
            f"-monitor unix:{DIR}/monitor-1.sock,server=on,wait=off "
            f"-serial mon:unix:{DIR}/serial-1.sock,server=on",
        ),
        (
            "-chardev socket,id=q,path=/run/q,server=on,wait=off -mon chardev=q,mode=control",
            f"-chardev socket,id=q,path={DIR}/chardev-1.sock,server=on,wait=off "
            "-mon chardev=q,mode=control",
        ),
        (
            "-chardev socket,id=q,fd=27,server=on,wait=off -mon chardev=q",
            f"-chardev socket,id=q,server=on,wait=off,path={DIR}/chardev-1.sock -mon chardev=q",
        ),
        ("-vnc unix:/run/v,password=on", f"-vnc unix:{DIR}/vnc-1.sock,password=on"),
        # Files that two QEMUs would both write.
        ("-pidfile /run/vm.pid -D /var/log/vm", f"-pidfile {DIR}/pid -D {DIR}/qemu.log"),
        (
            "-serial file:/var/log/s -serial file:t",
            f"-serial file:{DIR}/serial-1.out -serial file:{DIR}/serial-2.out",
        ),
        (
            "-chardev file,id=f,path=/l,append=on -chardev pty,id=p,logfile=/k",
            f"-chardev file,id=f,path={DIR}/chardev-1.out,append=on "
            f"-chardev pty,id=p,logfile={DIR}/chardev-2.log",
        ),
        # Memory.
        (
            "-object memory-backend-file,id=ram0,size=1G,mem-path=/dev/shm/x,share=on",
            "-object memory-backend-file,id=ram0,size=1G,mem-path=/dev/shm/vmferry-m1-ram0,"
            "share=on",
        ),
        (
            "-object memory-backend-file,id=m,size=1G,mem-path=/mnt/huge/vm1",
            "-object memory-backend-file,id=m,size=1G,mem-path=/mnt/huge/vmferry-m1-m",
        ),
        ("-mem-path /var/ram", "-mem-path /dev/shm/vmferry-m1-ram"),
        (
            '-object \'{"qom-type":"memory-backend-file","id":"m","size":7,"share":true,'
            '"mem-path":"/x"}\'',
            '-object \'{"qom-type":"memory-backend-file","id":"m","size":7,"share":true,'
            '"mem-path":"/dev/shm/vmferry-m1-m"}\'',
        ),
        (
            "-object qom-type=memory-backend-file,id=m,host-nodes=0,host-nodes=2,size=1G,"
            "mem-path=/x",
            "-object qom-type=memory-backend-file,id=m,host-nodes=0,host-nodes=2,size=1G,"
            "mem-path=/dev/shm/vmferry-m1-m",
        ),
        # Taps.
        (
            "-netdev tap,id=n,ifname=tap7,script=/etc/up,vhostfd=9",
            "-netdev tap,id=n,ifname=tap7,script=no,downscript=no",
        ),
        (
            "-nic tap,model=e1000,mac=52:54:00:00:00:01",
            "-nic tap,model=e1000,mac=52:54:00:00:00:01,script=no,downscript=no",
        ),
        ("-netdev tap,id=n,ifname=tap7,script=no,downscript=no", None),
    ],
)
def test_options(before: str, after: str | None) -> None:
    assert between(rewritten(before)) == shlex.join(shlex.split(before if after is None else after))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("-snapshot", "-snapshot"),
        ("-add-fd fd=3,set=1", "-add-fd"),
        ("-netdev tap,id=n,fd=3", "tap of netdev n"),
        ("-drive file=d.img,if=virtio,snapshot=on", "snapshot=on"),
        ("-chardev socket,id=c,fd=5", "chardev c is a connection"),
        (
            "-object memory-backend-file,id=p,size=1G,mem-path=/pmem,share=on "
            "-device nvdimm,memdev=p,id=nv",
            "NVDIMM on /pmem",
        ),
    ],
)
def test_what_cannot_be_started_elsewhere(words: str, why: str) -> None:
    with pytest.raises(Refused, match=why):
        rewritten(words)


def test_names_of_taps() -> None:
    devices = "-device e1000,netdev=b,mac=52:54:00:AA:00:01"
    taps = {"tap7": "tap9", "52:54:00:aa:00:01": "tapmac", "c": "tapid"}
    result = rewritten(
        f"-netdev tap,id=a,ifname=tap7 -netdev tap,id=b,fd=5 {devices} "
        "-netdev tap,id=c,fds=6:7,vhostfds=8:9",
        Places(DIR, taps),
    )
    assert "tap,id=a,ifname=tap9,script=no,downscript=no" in result.argv
    assert "tap,id=b,ifname=tapmac,script=no,downscript=no" in result.argv
    assert "tap,id=c,queues=2,ifname=tapid,script=no,downscript=no" in result.argv


@pytest.mark.parametrize(
    ("words", "after"),
    [
        ("-M q35,accel=tcg", "-M pc-q35-7.2,accel=tcg"),
        ("-machine accel=tcg,type=pc", "-machine accel=tcg,type=pc-q35-7.2"),
        ("-machine pc-q35-7.2", "-machine pc-q35-7.2"),
        ("-m 64", "-m 64 -machine pc-q35-7.2"),
    ],
)
def test_an_alias_means_what_it_meant_at_the_source(words: str, after: str) -> None:
    assert between(rewritten(words, Places(DIR, machine="pc-q35-7.2"))) == after


def test_what_is_made_is_listed() -> None:
    result = rewritten(
        "-qmp unix:q,server=on -pidfile p -object memory-backend-file,id=m,mem-path=/dev/shm/x"
    )
    assert result.qmp == f"{DIR}/vmferry.qmp"
    assert {str(file) for file in result.files} == {
        result.qmp,
        f"{DIR}/qmp-1.sock",
        f"{DIR}/pid",
        "/dev/shm/vmferry-m1-m",
    }
    assert qmp_sockets(result.argv)[-1] == result.qmp


def test_every_change_is_told() -> None:
    assert rewritten("-m 64 -name vm").changes == []
    told = " ".join(rewritten("-daemonize -qmp unix:q,server=on -readconfig c").changes)
    assert all(word in told for word in ("-daemonize", "-qmp", "-readconfig"))


def test_twenty_moves_do_not_make_it_longer() -> None:
    argv = rewritten(
        "-name vm -M q35 -chardev socket,id=c,path=/a,server=on -mon chardev=c,mode=control "
        "-qmp unix:/q,server=on,wait=off -qmp unix:/q2,server=on -serial file:/s -pidfile /p "
        "-object memory-backend-file,id=m,size=1G,mem-path=/dev/shm/x,share=on "
        "-netdev tap,id=n,ifname=t0,script=no -daemonize"
    ).argv
    for move in range(20):
        place = Path(f"/run/vf/n{move % 10}")
        longer = rewrite(argv, Places(place))
        assert len(longer.argv) == len(argv)
        assert len(" ".join(longer.argv)) == len(" ".join(argv))
        assert longer.qmp == f"{place}/vmferry.qmp"
        assert not [w for w in longer.argv if str(DIR) in w or f"n{(move - 1) % 10}/" in w]
        argv = longer.argv


def test_a_place_too_deep_for_sockets() -> None:
    deepest = Path("/" + "d" * (SOCKET_PATH_MAX_BYTES - len("//vmferry.qmp")))
    assert len(rewritten("-m 64", Places(deepest)).qmp) == SOCKET_PATH_MAX_BYTES
    with pytest.raises(Refused, match="too long for a socket"):
        rewritten("-m 64", Places(deepest.with_name(deepest.name + "d")))


def test_commas_in_a_place_are_doubled() -> None:
    result = rewritten("-qmp unix:q,server=on", Places(Path("/run/a,b")))
    assert qmp_sockets(result.argv) == ["/run/a,b/qmp-1.sock", "/run/a,b/vmferry.qmp"]


@pytest.mark.parametrize(
    "text", ["socket,id=c,path=/a,,b,server=on", "id=x,opt=", "e1000,netdev=n", "a"]
)
def test_settings_are_written_as_they_were_read(text: str) -> None:
    assert str(Settings.parse(text)) == text
