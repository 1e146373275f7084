"""The converter of released checkpoints: it keeps every bit, and says what is wrong with a file and what to do."""

import argparse
import dataclasses
import json
import textwrap

import pytest
import torch

from neurostorm.model.config import SwinConfig
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.hub.pretrained import load_pretrained
from neurostorm.model.hub.reference import _FIELDS, ReferenceMismatch, load_reference, main


@pytest.mark.parametrize("name", ["mini:neurostorm_encoder__mini", "mini:swift_encoder__mini", "mini:mae__mini_window"])
def test_converting_a_checkpoint_keeps_every_bit(golden, tmp_path, capsys, name):
    case = golden(name)
    weights = {f"model.{key}": value for key, value in case.state_dict.items()}
    torch.save({"state_dict": weights, "hyper_parameters": case.config}, tmp_path / "released.ckpt")
    assert main([str(tmp_path / "released.ckpt"), str(tmp_path / "ours")]) == 0
    assert "parameters" in capsys.readouterr().out
    before, after = load_reference(tmp_path / "released.ckpt"), load_pretrained(tmp_path / "ours")
    x = case.tensors["input"]
    if "mae" in name:
        ours, theirs = before(x, mask=case.tensors["mask"]), after(x, mask=case.tensors["mask"])
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    else:
        assert torch.equal(before(x), after(x))


def test_the_converter_says_why_it_cannot(golden, tmp_path, capsys):
    case = golden("mini:mae__mini_window")
    torch.save(case.state_dict, tmp_path / "bare.pt")
    assert main([str(tmp_path / "bare.pt"), str(tmp_path / "ours")]) == 1
    assert "hyperparameters missing: img_size" in capsys.readouterr().err
    (tmp_path / "hparams.json").write_text(json.dumps(case.config))
    assert main([str(tmp_path / "bare.pt"), str(tmp_path / "ours"), "--hparams", str(tmp_path / "hparams.json")]) == 0


def test_the_example_of_missing_hyperparameters_is_the_released_model(golden, tmp_path):
    torch.save(golden("mini:mae__mini_window").state_dict, tmp_path / "bare.pt")
    with pytest.raises(ReferenceMismatch, match=r"missing: img_size.*--hparams FILE\.json") as error:
        load_reference(tmp_path / "bare.pt")
    text = str(error.value)
    hparams = json.loads(text[text.index("{") :])
    with torch.device("meta"):
        swin = SwinConfig(**{_FIELDS[name]: hparams[name] for name in _FIELDS if name in hparams}, layout="paper")
        encoder = SwinEncoder(dataclasses.replace(swin, mixer="mamba"))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 5_173_020


def test_hyperparameters_in_a_namespace_load(golden, tmp_path):
    case = golden("mini:neurostorm_encoder__mini")
    space = argparse.Namespace(**case.config)
    for number, stored in enumerate((space, {"args": space, "learning_rate": 1e-3})):
        torch.save({"state_dict": case.state_dict, "hyper_parameters": stored}, tmp_path / f"{number}.ckpt")
        case.close(load_reference(tmp_path / f"{number}.ckpt")(case.tensors["input"]), "output")


def test_the_advice_for_a_checkpoint_with_other_classes_works(golden, tmp_path, monkeypatch, capsys):
    case = golden("mini:neurostorm_encoder__mini")
    stored = {**case.config, "folder": tmp_path}  # a pathlib.Path is no plain value
    torch.save({"state_dict": case.state_dict, "hyper_parameters": stored}, tmp_path / "lab.ckpt")
    assert main([str(tmp_path / "lab.ckpt"), str(tmp_path / "ours")]) == 1
    first, *code = capsys.readouterr().err.splitlines()
    assert "lab.ckpt: refused" in first and "PosixPath" in first
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent("\n".join(code)), {})
    assert main(["plain.ckpt", str(tmp_path / "ours")]) == 0


def test_the_converter_says_what_is_wrong_with_a_file_and_what_to_do(golden, tmp_path, capsys):
    case = golden("mini:mae__mini_window")
    folder = tmp_path / "models"
    folder.mkdir()
    torch.save(case.state_dict, folder / "bare.pt")
    (tmp_path / "page.ckpt").write_text("<!DOCTYPE html>\n<html>")
    (tmp_path / "pointer.ckpt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    torch.save({"state_dict": case.state_dict, "hyper_parameters": [1]}, tmp_path / "list.ckpt")
    whole = (folder / "bare.pt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    for words, reason in (
        ([folder], f"{folder}: is a folder; give the file of a checkpoint, {folder} holds {folder}/bare.pt"),
        (
            [folder / "none.pt"],
            f"none.pt: is not there; give the file of a checkpoint, {folder} holds {folder}/bare.pt",
        ),
        ([tmp_path / "page.ckpt"], "page.ckpt: is no checkpoint, it starts with '<!DOCTYPE html>'. Download the file"),
        ([tmp_path / "pointer.ckpt"], "pointer.ckpt: is a Git LFS pointer, not the checkpoint: run `git lfs pull`"),
        ([tmp_path / "empty.ckpt"], "empty.ckpt: is empty; download"),
        ([tmp_path / "cut.ckpt"], "cut.ckpt: cannot be read"),
        ([tmp_path / "list.ckpt"], "list.ckpt: its 'hyper_parameters' are a list, not names and values"),
        ([folder / "bare.pt", "--hparams", tmp_path / "list.json"], "list.json: holds a list, expected"),
        ([folder / "bare.pt", "--hparams", tmp_path / "broken.json"], "broken.json: cannot be read as JSON"),
        ([folder / "bare.pt", "--hparams", tmp_path / "no.json"], "no.json: cannot be read as JSON"),
    ):
        assert main([str(words[0]), str(tmp_path / "ours"), *map(str, words[1:])]) == 1
        assert reason in (error := capsys.readouterr().err) and "Traceback" not in error
    assert not (tmp_path / "ours").exists()
    with pytest.raises(SystemExit) as caught:
        main([str(folder / "bare.pt")])
    assert caught.value.code == 2
