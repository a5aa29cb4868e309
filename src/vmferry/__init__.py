"""vmferry: live migration of running virtual machines, from outside the hypervisor.

The rooms, top to bottom; imports only point down (ARCHITECTURE.md):

    cli -> host -> engine | simulator -> strategies, wire -> guest, network -> _core
    report holds the records that all may write.
"""

__version__ = "0.1.0"
