"""What every stage of a run needs from the machine, PyTorch and other processes.

In: devices, modules and measured sizes. Out: context managers (threads, precision, default dtype,
hooks, ranks), measurements (memory, multiply-adds), and events for callbacks and progress bars.
Nothing here knows about unlearning. Read `progress` first, then `distributed`; `doctor` reports on
the installation.
"""
