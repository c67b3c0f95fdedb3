"""Which modules count as a model's blocks, and the copy that shares their parameters."""

import copy
import functools
import pickle
from collections import OrderedDict
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx.engine.copy_model import copy_structure
from fastvar_fx.engine.find_blocks import find_blocks
from fastvar_fx.errors import FastVARError, ModelError

C = 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)
        self.proj = nn.Linear(C, C)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(C, 4 * C)
        self.fc2 = nn.Linear(4 * C, C)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.ffn = FeedForward()


class CrossBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.cross = Attention()


class Chunk(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.module = nn.ModuleList(Block() for _ in range(count))


class ResBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3)
        self.norm = nn.GroupNorm(2, 64)


class Pair(nn.Module):
    """Layers as nn.ModuleList([attention, feed-forward]), run by their owner."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([Attention(), FeedForward()]) for _ in range(depth)
        )


class Model(nn.Module):
    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(C, C)
        self.head = nn.Sequential(nn.Linear(C, 8 * C), nn.GELU(), nn.Linear(8 * C, C))
        for name, part in parts.items():
            setattr(self, name, part)


def blocks(count: int) -> list[nn.Module]:
    return [Block() for _ in range(count)]


def paths(prefix: str, count: int) -> list[str]:
    return [f"{prefix}.{i}" for i in range(count)]


def assert_found(model: nn.Module, expected: list[str], blocks: Any = None) -> None:
    found = find_blocks(model, blocks)
    assert list(found) == expected
    known = dict(model.named_modules())
    assert all(known.get(name, module) is module for name, module in found.items())


# -- looking ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.ModuleList, lambda items: nn.Sequential(*items)])
def test_a_plain_list(kind: Any) -> None:
    assert_found(Model(blocks=kind(blocks(3))), paths("blocks", 3))


def test_one_block() -> None:
    assert_found(Model(blocks=nn.ModuleList(blocks(1))), ["blocks.0"])


def test_deep_inside() -> None:
    inner = Model(layers=nn.ModuleList(blocks(3)))
    assert_found(Model(transformer=inner), paths("transformer.layers", 3))


def test_chunks() -> None:
    chunks = nn.ModuleList([Chunk(2), Chunk(2), Chunk(1)])
    expected = [f"block_chunks.{i}.module.{j}" for i, j in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]]
    assert_found(Model(block_chunks=chunks), expected)


def test_chunks_of_one_block_each() -> None:
    """Loops call the blocks in the chunks and never the chunks: those found must be called."""
    model = Model(block_chunks=nn.ModuleList([Chunk(1), Chunk(1), Chunk(1)]))
    assert_found(model, [f"block_chunks.{i}.module.0" for i in range(3)])


def test_a_plain_python_list_beside_the_registered_one() -> None:
    model: Any = Model(chunks=nn.ModuleList([Chunk(2), Chunk(1)]))
    model.unrolled = [block for chunk in model.chunks for block in chunk.module]
    found = find_blocks(model, None)
    assert list(found.values()) == model.unrolled


def test_blocks_in_a_plain_python_list_only() -> None:
    model: Any = Model()
    model.hidden = blocks(2)
    assert list(find_blocks(model, None).values()) == model.hidden


def test_stages() -> None:
    stages = nn.ModuleList([nn.ModuleList(blocks(2)), nn.ModuleList(blocks(3))])
    expected = ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1", "stages.1.2"]
    assert_found(Model(stages=stages), expected)


def test_layers_that_are_no_modules_belong_to_their_owner() -> None:
    assert_found(Model(transformer=Pair(3)), ["transformer"])


def test_owners_of_such_layers_in_a_list() -> None:
    assert_found(Model(stages=nn.ModuleList([Pair(2), Pair(2)])), paths("stages", 2))


def test_lists_of_one_owner_with_blocks_of_one_class() -> None:
    model = Model(first=nn.ModuleList(blocks(2)), second=nn.ModuleList(blocks(3)))
    model.other = nn.ModuleList([CrossBlock()])
    assert_found(model, [*paths("first", 2), *paths("second", 3)])
    assert_found(model, paths("second", 3), blocks="second")


def test_a_vae_beside_them() -> None:
    decoder = nn.ModuleList(ResBlock() for _ in range(8))
    model: Any = Model(blocks=nn.ModuleList(blocks(3)), vae=Model(up=decoder))
    weights = sum(p.numel() for p in decoder.parameters())
    assert weights > sum(p.numel() for p in model.blocks.parameters())
    assert_found(model, paths("blocks", 3))


def test_a_smaller_text_encoder_beside_them() -> None:
    text = Model(layers=nn.ModuleList(FeedForward() for _ in range(2)))
    assert_found(Model(text=text, blocks=nn.ModuleList(blocks(4))), paths("blocks", 4))


def test_blocks_of_several_classes_in_a_list() -> None:
    mixed = [Block(), CrossBlock(), Block(), CrossBlock()]
    assert_found(Model(layers=nn.ModuleList(mixed)), paths("layers", 4))
    assert_found(Model(layers=nn.Sequential(*mixed)), paths("layers", 4))


def test_linear_layers_alone_are_no_blocks() -> None:
    with pytest.raises(ModelError) as caught:
        find_blocks(Model(projections=nn.ModuleList(nn.Linear(C, C) for _ in range(4))), None)
    assert isinstance(caught.value, FastVARError)


def test_no_blocks_lists_what_was_seen() -> None:
    model: Any = Model(up=nn.ModuleList(ResBlock() for _ in range(3)))
    model.head = nn.Identity()
    with pytest.raises(ModelError) as caught:
        find_blocks(model, None)
    message = str(caught.value)
    assert "no transformer blocks found in Model" in message
    assert all(name in message for name in ("Conv2d", "GroupNorm", "ResBlock", "Linear"))
    assert "blocks=" in message


# -- naming them --------------------------------------------------------------------------------


def test_by_path() -> None:
    model: Any = Model(
        blocks=nn.ModuleList(blocks(3)), other=Block(), seq=nn.Sequential(*blocks(2))
    )
    assert_found(model, paths("blocks", 3), "blocks")
    assert_found(model, ["other"], "other")
    assert_found(model, ["blocks.1"], "blocks.1")
    assert_found(model, paths("seq", 2), "seq")


def test_by_a_list_of_modules() -> None:
    model: Any = Model(blocks=nn.ModuleList(blocks(3)), other=Block())
    wanted = [model.other, model.blocks[2]]
    assert_found(model, ["other", "blocks.2"], wanted)
    model.plain = (Block(),)
    assert_found(model, ["plain.0"], [model.plain[0]])


def test_an_unknown_path_offers_close_ones() -> None:
    model: Any = Model(blocks=nn.ModuleList(blocks(1)))
    with pytest.raises(ModelError, match=r"blocks='block' is no module of Model.*did you mean blo"):
        find_blocks(model, "block")
    with pytest.raises(ModelError, match="did you mean embed or head"):
        find_blocks(model, "zzz")


@pytest.mark.parametrize("count", [0, 1])
def test_modules_of_another_model(count: int) -> None:
    model: Any = Model(blocks=nn.ModuleList(blocks(2)))
    wanted = [*model.blocks, *blocks(1)] if count else []
    expected = f"found {len(wanted)} modules, of which {len(wanted[:2])} belong to Model"
    with pytest.raises(ModelError, match=expected):
        find_blocks(model, wanted)


# -- the copy -----------------------------------------------------------------------------------


def test_parameters_are_shared_and_modules_are_not() -> None:
    model: Any = Model(blocks=nn.ModuleList(blocks(2)))
    model.register_buffer("table", torch.randn(3))
    model.register_buffer("scratch", torch.randn(3), persistent=False)
    made, copies = copy_structure(model)
    assert type(made) is Model
    originals, others = dict(model.named_modules()), dict(made.named_modules())
    assert list(originals) == list(others)
    for name, module in originals.items():
        assert others[name] is not module
        assert others[name] is copies[id(module)]
        assert type(others[name]) is type(module)
    for own, theirs in (
        (model.named_parameters(), made.named_parameters()),
        (model.named_buffers(), made.named_buffers()),
    ):
        left, right = dict(own), dict(theirs)
        assert left.keys() == right.keys()
        assert all(left[name] is right[name] for name in left)
    assert list(model.state_dict()) == list(made.state_dict())


def test_either_side_changes_alone() -> None:
    model: Any = Model(blocks=nn.ModuleList(blocks(2)))
    model.cache = {"k": [torch.zeros(2)], "meta": (1, [2])}
    keys = list(model.state_dict())
    made: Any = copy_structure(model)[0]
    made.blocks[0].attn.cached = torch.ones(1)
    made.blocks.append(Block())
    made.cache["k"].append(torch.ones(2))
    made.cache["meta"][1].append(3)
    made.register_buffer("new", torch.ones(1))
    made.train(not model.training)
    assert list(model.state_dict()) == keys
    assert not hasattr(model.blocks[0].attn, "cached")
    assert len(model.cache["k"]) == 1
    assert model.cache["meta"] == (1, [2])
    assert model.training is not made.training


class Owner(nn.Module):
    """Holds itself in every way that public code does."""

    class Named(NamedTuple):
        block: nn.Module
        number: int

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks(2))
        self.table = nn.Parameter(torch.randn(3))
        object.__setattr__(self.blocks[0], "owner", self)
        self.hidden = [self]
        self.pair = (self.blocks[1], 3)
        self.named = self.Named(self.blocks[0], 1)
        self.by_name = {"first": self.blocks[0], "nested": [{"second": self.blocks[1]}]}
        self.ordered = OrderedDict(b=self.blocks[1], a=self.blocks[0])
        self.method = self.scaled
        self.bound = partial(self.scaled, by=2.0)
        self.holding = partial(max, self.blocks[0], key=self.scaled)
        self.plain = partial(torch.mul, other=2)
        self.shape = torch.Size([2, 3])
        self.kept = self.table
        self.same = self.by_name
        self.generator = torch.Generator().manual_seed(3)
        self.generators = [self.generator]

    def scaled(self, x: Any, by: float = 1.0) -> Any:
        return self, x, by


def test_references_lead_into_the_copy() -> None:
    model: Any = Owner()
    made: Any = copy_structure(model)[0]
    first, second = made.blocks
    assert first is not model.blocks[0]
    assert first.owner is made
    assert made.hidden[0] is made
    assert made.pair == (second, 3)
    assert made.named == Owner.Named(first, 1)
    assert type(made.named) is Owner.Named
    assert made.by_name["first"] is first
    assert made.by_name["nested"][0]["second"] is second
    assert type(made.ordered) is OrderedDict
    assert list(made.ordered.items()) == [("b", second), ("a", first)]
    assert made.method(1) == (made, 1, 1.0)
    assert made.bound(1) == (made, 1, 2.0)
    assert made.holding.args == (first,)
    assert made.holding.keywords["key"].__self__ is made
    assert made.plain.keywords == {"other": 2}
    assert made.shape is model.shape
    assert made.kept is model.table
    assert made.same is made.by_name
    assert model.hidden[0] is model
    assert model.method(1) == (model, 1, 1.0)


def test_closures_lead_into_the_copy() -> None:
    def patched(block: Any) -> Any:
        old = block.scaled
        return lambda x: (old(x), block)

    model: Any = Owner()
    model.patched = patched(model)
    model.wrapped = functools.wraps(model.patched)(lambda x: model.patched(x))
    model.plain_function = len
    made: Any = copy_structure(model)[0]
    assert made.patched(1) == ((made, 1, 1.0), made)
    assert made.wrapped(1) == ((made, 1, 1.0), made)
    assert made.wrapped.__name__ == model.wrapped.__name__
    assert made.plain_function is len
    assert model.patched(1) == ((model, 1, 1.0), model)


def test_generators_are_copied_with_their_state() -> None:
    model: Any = Owner()
    torch.rand(5, generator=model.generator)
    made: Any = copy_structure(model)[0]
    assert made.generator is not model.generator
    assert made.generators[0] is made.generator
    drawn = torch.rand(3, generator=made.generator)
    assert torch.equal(torch.rand(3, generator=model.generator), drawn)


def test_hooks_lead_into_the_copy() -> None:
    model: Any = Model(blocks=nn.ModuleList(blocks(1)))
    seen: list[nn.Module] = []
    model.head.register_forward_hook(lambda module, *_: seen.append(module))
    made: Any = copy_structure(model)[0]
    made.head(torch.randn(1, C))
    assert seen == [made.head]


def test_a_container_that_holds_itself() -> None:
    model: Any = Model()
    loop: list[Any] = []
    loop.append(loop)
    model.loop = loop
    made: Any = copy_structure(model)[0]
    assert made.loop is not loop
    assert made.loop[0] is made.loop


def test_a_copy_can_be_copied_and_runs() -> None:
    model: Any = Model()
    made: Any = copy_structure(model)[0]
    x = torch.randn(2, C)
    expected: Tensor = model.head(x)
    assert torch.equal(made.head(x), expected)
    assert torch.equal(copy.deepcopy(made).head(x), expected)


# --- modules that cannot be copied as others are --------------------------------------------------


class Drawn(nn.Module):
    """A model with a decoder beside its blocks."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.decoder = decoder


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_module_is_shared_and_a_traced_graph_copied() -> None:
    x = torch.randn(1, C)
    scripted = Drawn(torch.jit.script(nn.Linear(C, C)))
    copied: Any = copy_structure(scripted)[0]
    assert copied.decoder is scripted.decoder
    graph = Drawn(torch.fx.symbolic_trace(nn.Linear(C, C)))
    copied = copy_structure(graph)[0]
    assert copied.decoder is not graph.decoder
    assert torch.equal(copied.decoder(x), graph.decoder(x))


def test_a_transformed_model_is_copied_but_not_pickled() -> None:
    fast = fastvar_fx.transform(Drawn(nn.Identity()).eval(), fastvar_fx.Schedule((1, 2), (0.5,)))
    assert type(copy.deepcopy(fast).blocks[0]) is type(fast.blocks[0])
    with pytest.raises(pickle.PicklingError, match=r"state_dict\(\) and the schedule"):
        pickle.dumps(fast)
