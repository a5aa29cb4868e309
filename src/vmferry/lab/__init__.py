"""Two hosts and an outside client on one machine: for the demo, the tests and the bench.

async with Lab() as lab:
    guest = await lab.boot_guest(load=Load(128, 40))
    client = await lab.start_client(guest)
    await lab.start_hosts()
    await lab.move(guest, "pre-copy", client=client)
    await lab.migrate_with_qemu(guest, "pre-copy", client=client)
    await guest.counts()
"""
