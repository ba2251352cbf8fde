"""What torch saves is what is read, to the bit: needs torch to compare with."""

from collections import OrderedDict

import ml_dtypes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.checkpoints.pytorch.pth_files import open_pth, verify
from tests.pth_files import assert_trees_same, read

torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64]
DTYPES += [torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def in_numpy(tree):
    """A tree of tensors as one of NumPy arrays."""
    if isinstance(tree, torch.Tensor):
        whole = tree.detach().contiguous()
        if tree.dtype == torch.bfloat16:
            return whole.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return whole.numpy()
    if isinstance(tree, dict):
        return {name: in_numpy(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(in_numpy, tree))
    return tree


def assert_read(path, tree):
    assert_trees_same(read(open_pth(path)), in_numpy(tree))
    assert verify(path) == []


def make(dtype, *shape):
    return torch.randint(-99, 99, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@st.composite
def tensors(draw):
    """A view of a tensor: cut, strided, transposed, expanded."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    tensor = make(draw(st.sampled_from(DTYPES)), *shape)
    for axis, n in enumerate(shape):
        start = draw(st.integers(0, n))
        tensor = tensor.narrow(axis, start, draw(st.integers(0, n - start)))
    if shape and draw(st.booleans()):
        tensor = tensor[:: draw(st.integers(1, 3))]
    if draw(st.booleans()):
        tensor = tensor.permute(draw(st.permutations(range(tensor.ndim))))
    if draw(st.booleans()):
        tensor = tensor[None].expand(3, *tensor.shape)
    return tensor


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
trees = st.recursive(
    tensors() | plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60)
@given(trees, st.integers(2, 5))
def test_trees(tmp_path_factory, tree, protocol):
    path = tmp_path_factory.mktemp("trees") / "a.pth"
    torch.save(tree, path, pickle_protocol=protocol)
    assert_read(path, tree)


def test_a_training_state(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4)).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    model(torch.ones(3, 5, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 1}
    torch.save(state, tmp_path / "a.pth")
    assert_read(tmp_path / "a.pth", state)
    assert type(open_pth(tmp_path / "a.pth")["model"]) is OrderedDict


def test_parameters_and_shared_storages(tmp_path):
    base = make(torch.float32, 6, 8)
    tree = {
        "tied": [torch.nn.Parameter(base), base, base.T, base[2:4, 1::3], base.view(-1)[5]],
        "frozen": torch.nn.Parameter(base[0], requires_grad=False),
        "diagonal": base.diagonal(),
        "windows": base.unfold(1, 3, 1),
    }
    torch.save(tree, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < 4000
    assert_read(tmp_path / "a.pth", tree)


def test_a_file_that_was_saved_to_memory(tmp_path):
    with (tmp_path / "a.pth").open("wb") as file:
        torch.save({"w": make(torch.int8, 3)}, file)
    assert_read(tmp_path / "a.pth", {"w": make(torch.int8, 3)})


@pytest.mark.parametrize(
    "tree, name",
    [
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (torch.bfloat16, "torch.bfloat16"),
        (torch.Size([2]), "torch.Size"),
        (torch.ones(2, dtype=torch.complex64), "torch.ComplexFloatStorage"),
        (torch.ones(2).to(torch.float8_e5m2), "torch._utils._rebuild_tensor_v3"),
        (torch.eye(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        ({1, 2}, "__builtin__.set"),
        (b"bytes", "_codecs.encode"),
        (range(2), "__builtin__.xrange"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_plain_tensor_is_refused(tmp_path, tree, name):
    torch.save({"w": tree}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"refused global {name} in .*a\.pth"):
        open_pth(tmp_path / "a.pth")


def test_negated_views_are_refused(tmp_path):
    torch.save(torch.ones(2, dtype=torch.complex64).conj().imag, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="refused a conjugate or negative view"):
        open_pth(tmp_path / "a.pth")
