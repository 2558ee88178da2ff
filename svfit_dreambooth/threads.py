"""How torch's threads wait for each other."""

import os


def wait_asleep() -> None:
    """Lets threads that wait for each other sleep, unless the environment says otherwise; to be called before torch is imported.

    By OpenMP's default they spin: beside one other busy process a step of a small network then takes ten times as
    long and more, since a thread that spins keeps off the core the one that it waits for.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
