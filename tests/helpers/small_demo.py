"""A recipe for the demo with fewer rows and a smaller model: a few seconds. It forgets by plain NPO, so that leak tests
have something to find. The fixture `small_demo` runs it once."""

from lowmem_npo.commands.demo.recipe import Recipe, Teaching
from lowmem_npo.config import AdapterConfig

SMALL = Recipe(
    teaching=Teaching(vocabulary=320, layers=2, width=64, heads=2, epochs=60, batch_size=8, lr=4e-3),
    epochs=20,
    recipe="paper",
    adapter=AdapterConfig(lora_r=16, lora_alpha=16, lora_targets=("all-linear",)),
    batch_size=6,
    retain_batch_size=12,
    lr=2e-3,
    limit=12,
)
