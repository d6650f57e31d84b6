"""Which models can take packed rows, judged by their numbers."""

from helpers.architectures import tiny_config

from lowmem_npo.model.packable import packable


def test_a_token_whose_state_is_zero_is_no_reason_to_pad():
    """OLMo-7B's padding token is 1 and its embedding 0: norms, attention and MLP leave it so."""
    config = tiny_config("olmo", 97)
    config.pad_token_id = 1
    assert packable(config, "sdpa")
