"""A run's directory of Hugging Face is read by transformers as the same model, and import and export give the same bytes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

import fnrecipe
from fnrecipe import tree
from fnrecipe.config import TokenizerSection, resolve
from fnrecipe.data import open_tokenizer
from fnrecipe.data.huggingface import train_bpe
from fnrecipe.errors import CheckpointError, UsageError
from fnrecipe.generation.generator import go_on
from fnrecipe.generation.sampling import Sampling
from fnrecipe.interop.hugging_face.export import export
from fnrecipe.interop.hugging_face.tokenizer import tokenizer_files
from fnrecipe.models.model import find_model
from fnrecipe.presets import generator
from fnrecipe.random import key
from fnrecipe.shell.find_recipe import find
from fnrecipe.shell.trained.export import import_model
from tests.helpers import assert_same_bits, bits
from tests.interop.conftest import TEMPLATE
from tests.interop.reading import read, section

QUICK = ["dataset.max_seq_len=32", "gang.device=cpu"]


@pytest.fixture(scope="module")
def imported(saved: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for each directory of `saved`."""
    root, lm = tmp_path_factory.mktemp("imported"), find("lm").load()
    for path in saved.iterdir():
        dtype = "bfloat16" if path.name == "bfloat16" else "float32"
        pairs = [f"model.path={path}", f"model.dtype={dtype}", f"dataset.sources={texts}", *QUICK]
        import_model(lm, resolve(lm.config, pairs=pairs)[0], root / path.name)
    return root


def all_tensors(path: Path) -> dict[str, object]:
    return {name: bits(leaf) for file in path.glob("*.safetensors") for name, leaf in load_file(file).items()}


@pytest.mark.parametrize("name", ["tied", "untied", "sharded", "bfloat16"])
def test_import_and_export_give_the_same_tensors(saved: Path, imported: Path, tmp_path: Path, name: str) -> None:
    fnrecipe.export(imported / name, tmp_path / "out", shard_size=20_000 if name == "sharded" else 10**9)
    assert all_tensors(tmp_path / "out") == all_tensors(saved / name)
    before, after = (json.loads((path / "config.json").read_text()) for path in (saved / name, tmp_path / "out"))
    assert after["dtype"] == after["torch_dtype"] == before["dtype"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]


def test_transformers_reads_it_as_the_same_model(saved: Path, imported: Path, tmp_path: Path) -> None:
    fnrecipe.export(imported / "tied", tmp_path / "out", shard_size=20_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert all((tmp_path / "out" / file).stat().st_size < 22_000 or file == files[0] for file in files)
    for file in files:
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    ours, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved / "tied")
    tokens = torch.randint(0, 288, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    different = {k for k, v in theirs.config.to_dict().items() if ours.config.to_dict()[k] != v}
    assert different <= {"_name_or_path", "transformers_version"}
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


def test_greedy_tokens_are_those_of_transformers(saved: Path, imported: Path, tmp_path: Path) -> None:
    fnrecipe.export(imported / "tied", tmp_path / "out")
    _, config, params = fnrecipe.load(imported / "tied")
    prompt = [5, 17, 200]
    greedy = generator(config.model, config.trainer, Sampling(temperature=0.0), context=32, vocab_size=288)
    ours = go_on(greedy, params, prompt, key(0), 20)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours == found[0, 3:].tolist()


def test_the_tokenizer_and_its_template_go_with_it(saved: Path, imported: Path, tmp_path: Path) -> None:
    fnrecipe.export(imported / "tied", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (saved / "tied" / name).read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.bos_token_id) == (TEMPLATE, 0, 1)


def test_bytes_are_a_tokenizer_of_transformers_too(imported: Path, tmp_path: Path) -> None:
    fnrecipe.export(imported / "untied", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("def f(x):\n\treturn  x\r\n", "é ü 漢字 🙂", "".join(map(chr, range(256))), " <|endoftext"):
        assert tokenizer.encode(text, add_special_tokens=False) == list(text.encode())
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, len(tokenizer)) == (256, 256, 257)


def test_ends_that_the_user_chose_are_those_of_the_export(saved: Path, tmp_path: Path) -> None:
    path = str(saved / "tied/tokenizer.json")
    tokenizer = TokenizerSection("hf", path, eos_token="<|begin|>")  # noqa: S106 no password
    export(tmp_path / "out", section(saved / "tied"), tokenizer, read(saved / "tied"), dtype=None, shard_size=10**9)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (found.eos_token, found.chat_template) == ("<|begin|>", TEMPLATE)


@pytest.mark.parametrize("given", ["tokenizer.json", ""])
def test_what_ends_the_answers_of_a_chat_template_ends_those_of_transformers(saved: Path, tmp_path: Path, given: str) -> None:
    template = TEMPLATE.replace("eos_token", "'<|begin|>'")
    there = Path(shutil.copytree(saved / "tied", tmp_path / "there"))
    begin, end = (open_tokenizer("hf", str(there)).special[name] for name in ("<|begin|>", "<|end|>"))
    tokenizer = TokenizerSection("hf", str(there / given), eos_token="<|end|>")  # noqa: S106 no password
    model = section(there), tokenizer, read(there)
    export(tmp_path / "out", *model, chat_template=template, dtype=None, shard_size=10**9)
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    before = end if given else transformers.GenerationConfig.from_pretrained(there).eos_token_id
    assert found.eos_token_id == [before, begin]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == before


@pytest.mark.parametrize("given", ["tokenizer.json", ""])
def test_ends_are_those_that_the_run_had(saved: Path, tmp_path: Path, given: str) -> None:
    """A directory says `<|im_end|>`; a run that was given only the tokenizer.json in it had that file's `<|endoftext|>`."""
    there = Path(shutil.copytree(saved / "tied", tmp_path / "there"))
    train_bpe(iter(["some words"]), 280, ["<|endoftext|>", "<|im_end|>"], show_progress=False).save(
        str(there / "tokenizer.json")
    )
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_end|>", "eos_token": "<|im_end|>"}
    (there / "tokenizer_config.json").write_text(json.dumps(told))
    for name in ("config.json", "generation_config.json"):
        (there / name).write_text(json.dumps({**json.loads((there / name).read_text()), "bos_token_id": 1, "eos_token_id": 1}))
    tokenizer = TokenizerSection("hf", str(there / given))
    export(tmp_path / "out", section(there), tokenizer, read(there), dtype=None, shard_size=10**9)
    end = open_tokenizer(tokenizer.family, tokenizer.path).eos
    assert end == (0 if given else 1)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    configs = [json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "generation_config.json")]
    assert [found.eos_token_id, found.bos_token_id] == [end, end]
    assert [(config["bos_token_id"], config["eos_token_id"]) for config in configs] == [(end, end)] * 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_dtype_casts_every_tensor(imported: Path, tmp_path: Path, dtype: str) -> None:
    found = fnrecipe.export(imported / "tied", tmp_path / "out", dtype=dtype)
    params = tree.paths(fnrecipe.load(imported / "tied").params)
    written = load_file(tmp_path / "out/model.safetensors")
    expected = params["layers.1.up"].to(getattr(torch, dtype))
    assert_same_bits(written["model.layers.1.mlp.up_proj.weight"], expected)
    assert found.dtype == dtype
    assert found.size == sum(leaf.nbytes for leaf in written.values())


def test_numbers_too_large_for_a_dtype_are_refused(saved: Path, tmp_path: Path) -> None:
    params = read(saved / "tied")
    params["norm"][3] = 1e6
    with pytest.raises(UsageError, match=r"^model\.norm\.weight: expected numbers that float16 can hold, found 1e\+06$"):
        export(tmp_path / "out", section(saved / "tied"), TokenizerSection(), params, dtype=torch.float16, shard_size=10**9)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_written_over(imported: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fnrecipe.export(imported / "tied", tmp_path / "empty")
    (tmp_path / "file").write_text("")
    for name in ("empty", "file"):
        with pytest.raises(UsageError, match="expected a directory that is not there yet"):
            fnrecipe.export(imported / "tied", tmp_path / name)


def test_files_have_the_modes_of_the_umask(imported: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        fnrecipe.export(imported / "tied", tmp_path / "out")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o640}


def test_a_step_is_one_that_is_there(imported: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a checkpoint of step 7, found those of 0"):
        fnrecipe.export(imported / "tied", tmp_path / "out", step=7)
    fnrecipe.export(imported / "tied", tmp_path / "out", step=0)


def test_parameters_of_another_model_are_refused(saved: Path, tmp_path: Path) -> None:
    params = {**read(saved / "tied"), "more": torch.ones(3)}
    with pytest.raises(UsageError, match=r"expected the parameters of model\.family=llama, found others: more"):
        export(tmp_path / "out", section(saved / "tied"), TokenizerSection(), params, dtype=None, shard_size=10**9)


def test_a_family_that_transformers_has_not_is_not_exported(saved: Path, tmp_path: Path) -> None:
    import attrs

    from fnrecipe.interop.hugging_face import export as module

    alone = attrs.evolve(find_model("llama"), hugging_face=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "find_family", lambda name: alone)
        with pytest.raises(UsageError, match=r"model\.family: expected a family that transformers has a model of, found llama"):
            export(tmp_path / "o", section(saved / "tied"), TokenizerSection(), {}, dtype=None, shard_size=1)


def test_a_run_gives_its_parameters_to_another_one(saved: Path, imported: Path) -> None:
    assert_same_bits(read(imported / "tied"), read(saved / "tied"))
    assert_same_bits(read(imported / "bfloat16"), tree.map(torch.Tensor.float, read(saved / "bfloat16", dtype="bfloat16")))
    found = section(imported / "tied")
    assert found.config == section(saved / "tied").config


def test_the_chat_template_of_the_config_goes_with_the_export(saved: Path, tmp_path: Path) -> None:
    sft, template = find("sft").load(), tmp_path / "mine.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    pairs = [f"model.path={saved}/tied", f"dataset.chat_template={template}", f"dataset.sources={tmp_path}/a.jsonl", *QUICK]
    import_model(sft, resolve(sft.config, pairs=pairs)[0], tmp_path / "run")
    fnrecipe.export(tmp_path / "run", tmp_path / "out")
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read.chat_template == template.read_text() != TEMPLATE


def test_a_chat_template_beside_a_tokenizer_alone_goes_with_the_export(saved: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "words/tokenizer.json"
    tokenizer.parent.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tokenizer.parent / name).write_bytes((saved / "tied" / name).read_bytes())
    given = TokenizerSection("hf", str(tokenizer), eos_token="<|end|>")  # noqa: S106 no password
    assert tokenizer_files(given, 64).files["chat_template.jinja"].decode() == TEMPLATE
