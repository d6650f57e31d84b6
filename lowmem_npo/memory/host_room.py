"""Whether the host has room for a merged model, which is measured as soon as it is written."""

from __future__ import annotations

from pathlib import Path

from lowmem_npo.environment import available_memory
from lowmem_npo.errors import UserError
from lowmem_npo.sizes import compared


def check_room(folder: Path, four_bits: bool) -> None:
    """Raises UserError if the weights in `folder`, rounded to 4 bits or as they are, do not fit into memory: taking
    more would end the process."""
    needed = sum(file.stat().st_size for file in folder.glob("*.safetensors")) // (3 if four_bits else 1)
    if (free := available_memory()) < needed:
        takes, has = compared(needed, free)
        raise UserError(f"the merged model takes {takes} of memory, and {has} are free")
