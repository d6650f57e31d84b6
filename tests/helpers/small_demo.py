"""A recipe for the demo with fewer rows and a smaller model: a few seconds. The fixture `small_demo` runs it once."""

from lowmem_npo.commands.demo.recipe import Recipe, Teaching

SMALL = Recipe(
    teaching=Teaching(vocabulary=320, layers=2, width=64, heads=2, epochs=60, batch_size=8, lr=4e-3),
    epochs=20,
    batch_size=3,  # half of a fold
    retain_batch_size=6,
    lr=2e-3,
    limit=12,
)
