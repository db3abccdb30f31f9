"""Directories of transformers' own models give the parameters that compute what these do, whole or cut over ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fnrecipe import tree
from fnrecipe.config import resolve, unstructure, yaml
from fnrecipe.errors import UsageError
from fnrecipe.models.model import find_model
from fnrecipe.nn.policy import Policy
from fnrecipe.parallel.mesh import Axis, Mesh, global_slice, is_shard
from fnrecipe.recipes.lm.config import config as lm
from fnrecipe.streams import make_tokenizer
from fnrecipe.tree import Tree
from tests.helpers import assert_close, assert_same_bits
from tests.interop.reading import check_shards, read, section
from tests.ranks import on_ranks

TOKENS = torch.randint(0, 288, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(path: Path, params: Tree) -> Tensor:
    found = section(path)
    segments, positions = torch.zeros_like(TOKENS), torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    apply = find_model(found.family).apply
    return apply(found.config, params, TOKENS, segments, positions, policy=Policy(), scope="document").detach()


def their_logits(path: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(TOKENS).logits
    return found


@pytest.mark.parametrize("name", ["tied", "untied", "sharded", "bfloat16"])
def test_the_logits_are_those_of_transformers(saved: Path, name: str) -> None:
    assert_close(logits(saved / name, read(saved / name)), their_logits(saved / name), 1e-5)


def test_parameters_have_the_dtype_of_the_config(saved: Path) -> None:
    wide, narrow = read(saved / "bfloat16"), read(saved / "bfloat16", dtype="bfloat16")
    assert {leaf.dtype for leaf in tree.leaves(wide)} == {torch.float32}
    assert_same_bits(wide, tree.map(Tensor.float, narrow))
    assert_same_bits(narrow, tree.map(Tensor.bfloat16, read(saved / "tied")))


def test_files_may_change_once_they_are_read(saved: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved / "tied", tmp_path / "tied"))
    params = read(path)
    before = tree.map(Tensor.clone, params)
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(-5000, 2)
        file.write(b"\1" * 5000)
    assert_same_bits(params, before)
    assert all(leaf.is_contiguous() for leaf in tree.leaves(params))


def test_an_equal_head_beside_tied_embeddings_is_no_second_parameter(saved: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved / "tied", tmp_path / "tied"))
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path / "model.safetensors")
    assert_same_bits(read(path), read(saved / "tied"))


def test_a_model_that_was_saved_without_its_head_has_shorter_names(saved: Path, tmp_path: Path) -> None:
    model = transformers.AutoModel.from_pretrained(saved / "tied")
    model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    assert_same_bits(read(tmp_path), read(saved / "tied"))


def test_constants_of_older_versions_are_passed_over(saved: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved / "tied", tmp_path / "tied"))
    tensors = load_file(path / "model.safetensors")
    constant = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**tensors, **constant}, path / "model.safetensors")
    assert_same_bits(read(path), read(saved / "tied"))


def test_links_into_a_cache_are_followed(saved: Path, tmp_path: Path) -> None:
    for file in (saved / "sharded").iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert_same_bits(read(tmp_path), read(saved / "sharded"))


def test_two_ranks_read_their_shards(saved: Path) -> None:
    on_ranks(2, check_shards, saved / "sharded")


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_that_cuts_tensors_in_two_ways_keeps_their_slices(saved: Path, rank: int) -> None:
    shard, tensor = Axis("shard", 2, rank // 2, blocks=2), Axis("tensor", 2, rank % 2, blocks=2)
    mesh = Mesh(shard=shard, tensor=tensor, rules=find_model("llama").rules(section(saved / "untied").config))
    mine = tree.paths(read(saved / "untied", mesh.cut), is_shard)
    expected = {path: mesh.cut(path, leaf) for path, leaf in tree.paths(read(saved / "untied")).items()}
    assert {path: global_slice(leaf) for path, leaf in mine.items()} == {p: global_slice(e) for p, e in expected.items()}
    assert_same_bits(tree.leaves([*mine.values()]), tree.leaves([expected[path] for path in mine]))


PAIRS = ["dataset.max_seq_len=32"]


def test_the_directory_is_a_source_of_values_with_a_name_of_its_own(saved: Path) -> None:
    found, sources = resolve(lm, pairs=[f"model.path={saved / 'tied'}", "model.config.rope_theta=500.0", *PAIRS])
    file = str(saved / "tied/config.json")
    assert (found.model.family, found.model.arch, found.model.config.vocab_size) == ("llama", None, 288)
    assert sources["model.config.vocab_size"] == sources["tokenizer.path"] == sources["tokenizer.bos_token"] == file
    assert sources["model.config.rope_theta"] == "command line"
    tokenizer = found.tokenizer
    assert (tokenizer.family, tokenizer.path) == ("hf", str(saved / "tied/tokenizer.json"))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin|>", "<|end|>")


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("tokenizer.family=byte", ("byte", None, None, None)),
        ("tokenizer={family: hf, path: mine.json}", ("hf", "mine.json", None, None)),
        ("tokenizer.eos_token=the", ("hf", "there", "<|begin|>", "the")),
    ],
)
def test_a_tokenizer_of_the_user_stands(saved: Path, pair: str, expected: tuple[str | None, ...]) -> None:
    found, _ = resolve(lm, pairs=[f"model.path={saved / 'tied'}", pair, *PAIRS])
    here = found.tokenizer
    path = "there" if here.path == str(saved / "tied/tokenizer.json") else here.path
    assert (here.family, path, here.bos_token, here.eos_token) == expected


def test_a_resolved_config_needs_its_directory_no_more(saved: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved / "tied", tmp_path / "tied"))
    found, _ = resolve(lm, pairs=[f"model.path={path}", *PAIRS])
    (tmp_path / "config.yaml").write_text(yaml.dump(unstructure(found)))
    shutil.rmtree(path)
    assert resolve(lm, [tmp_path / "config.yaml"])[0] == found


def test_values_under_another_path_do_not_count(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text(f"model: {{path: {saved / 'untied'}, config: {{rope_theta: 7.0}}}}\n")
    found, _ = resolve(lm, [tmp_path / "first.yaml"], [f"model.path={saved / 'tied'}", *PAIRS])
    assert (found.model.config.rope_theta, found.model.config.tied_embeddings) == (10000.0, True)


def test_a_smaller_vocabulary_is_fine_and_a_larger_one_is_refused(saved: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved / "tied", tmp_path / "tied"))
    found, _ = resolve(lm, pairs=[f"model.path={path}", *PAIRS])
    assert make_tokenizer(found).vocab_size == 280
    larger = json.loads((path / "tokenizer.json").read_text())
    larger["added_tokens"] += [{**larger["added_tokens"][0], "id": id, "content": f"<|{id}|>"} for id in range(280, 289)]
    (path / "tokenizer.json").write_text(json.dumps(larger))
    with pytest.raises(UsageError, match=r"model\.config\.vocab_size: expected at least the tokenizer's 289, found 288"):
        make_tokenizer(found)
