"""A command of lowmem-npo that waits after a step of training until a signal comes; a killed one never comes to its
end before it is killed. python waiting.py STEP COMMAND..."""

import sys
import time

from lowmem_npo.cli import main
from lowmem_npo.training.preemption import Preemption

step, *command = sys.argv[1:]
on_step_end = Preemption.on_step_end


def waits(self, args, state, control, **kwargs):
    while state.global_step == int(step) and self.number is None:
        time.sleep(0.01)
    on_step_end(self, args, state, control, **kwargs)


if __name__ == "__main__":
    Preemption.on_step_end = waits  # type: ignore[method-assign]
    sys.exit(main(command))
