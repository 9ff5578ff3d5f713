"""InceptionV3 of FID against pytorch-fid's own, with the same random weights, read from PyTorch's files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inception_weights import random_weights

from jaxgen.interop.inception import inception_params, read_inception
from jaxgen.models.inception import InceptionV3

torch = pytest.importorskip("torch")


def _import_pytorch_fid():
    """The module, or a skip. It needs torchvision's network alone, not its compiled operators, which a build
    for another PyTorch lacks; torchvision asks only that two of them have a name."""
    try:
        names = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                names.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import pytorch_fid.inception
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"pytorch-fid or torchvision cannot be imported: {error}")
    return pytorch_fid


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """(pytorch-fid's network, the file of its weights): all its tensors are ours, by name and shape."""
    pytorch_fid = _import_pytorch_fid()
    tensors = {name: torch.tensor(value) for name, value in random_weights().items()}
    counts = {name.replace("running_var", "num_batches_tracked"): torch.tensor(7) for name in tensors}
    tensors |= {name: count for name, count in counts.items() if name.endswith("num_batches_tracked")}
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(tensors, file, _use_new_zipfile_serialization=False)  # as the public file is
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: tensors)
        network = pytorch_fid.inception.InceptionV3([3]).eval()
    return network, file


def test_features_of_the_same_weights_are_equal(twins):
    network, file = twins
    # The last blocks see 2x3 pixels: on a single one their poolings would do nothing.
    x = np.random.default_rng(1).uniform(-1, 1, (1, 107, 139, 3)).astype(np.float32)
    network.resize_input = False
    with torch.no_grad():
        theirs = network(torch.tensor(x.transpose(0, 3, 1, 2) / 2 + 0.5))[0][:, :, 0, 0].numpy()
    params = inception_params(read_inception(file))
    ours, logits = jax.jit(InceptionV3(resize=False).apply)({"params": params}, x)
    assert (ours.shape, logits.shape) == ((1, 2048), (1, 1008))
    assert theirs.std() > 0.1
    # 50 layers of float32 sums in another order.
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    np.testing.assert_allclose(
        logits, theirs @ params["fc"]["kernel"] + params["fc"]["bias"][None], atol=1e-3
    )


@pytest.mark.parametrize("size", [(28, 28), (32, 40), (299, 299), (320, 310)])
def test_images_are_resized_alike(size):
    x = np.random.default_rng(2).uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(x.transpose(0, 3, 1, 2)), size=(299, 299), mode="bilinear", align_corners=False
    )
    ours = jax.image.resize(jnp.asarray(x), (1, 299, 299, 3), "bilinear", antialias=False)
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-5)
