"Each worker has a core to itself: with a thread for every core each, they would wait for one another. (So has a process alone.)"
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the workers, which have not yet loaded torch
