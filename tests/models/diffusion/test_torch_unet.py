"""That the networks in torch which scripts/on_gpu.py races are diffusers'."""

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from scripts.torch_unet import Decoder, UNet  # noqa: E402

pytestmark = pytest.mark.parity


def randomized(module):
    torch.manual_seed(0)
    for p in module.parameters():
        p.data.normal_(0, 0.2)
    return module.eval()


@torch.inference_mode()
def test_unet():
    sizes = {"block_out_channels": (8, 16, 16, 24), "cross_attention_dim": 12}
    theirs = diffusers.UNet2DConditionModel(**sizes, attention_head_dim=2, norm_num_groups=4)
    ours = UNet((8, 16, 16, 24), heads=2, context=12, groups=4).eval()
    ours.load_state_dict(randomized(theirs).state_dict())
    x, text = torch.randn(3, 4, 16, 16), torch.randn(3, 5, 12)
    t = torch.tensor([1, 500, 999])
    expected = theirs(x, t, text).sample
    torch.testing.assert_close(ours(x, t, text), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_decoder():
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16),
        up_block_types=("UpDecoderBlock2D",) * 3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=4,
    )
    ours = Decoder((8, 16, 16), groups=4).eval()
    state = randomized(theirs).state_dict()
    ours.load_state_dict({k: v for k, v in state.items() if k.startswith(("decoder", "post"))})
    z = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(ours(z), theirs.decode(z).sample, rtol=1e-4, atol=1e-4)


def test_it_has_as_many_parameters_as_sd_15():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet().parameters()) == 859_520_964
