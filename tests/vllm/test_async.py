"""The asynchronous trainer against a real vLLM server: which weights sampled each token, resume, a dead server."""

import json
import signal
import string
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

pytest.importorskip("vllm")

import trl

from cppo_trl import AsyncCPPOConfig, AsyncCPPOTrainer
from cppo_trl.asynchronous.file_transfer import FileTransfer
from cppo_trl.launch.command import main
from cppo_trl.output.checkpoints import RunError, last_checkpoint
from tests.asynchronous.conftest import run_on_the_cpu
from tests.conftest import character_tokenizer, tiny_model
from tests.vllm.conftest import Server, running

SPECIAL = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "\n", "<unk>"]
ALPHABET = [*SPECIAL, *string.digits, *string.ascii_letters, *" +-=*.,:<>/|_"]
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    run_on_the_cpu(monkeypatch.setattr)


def tokenizer():
    """Characters, with a chat template that TRL's worker knows."""
    characters = character_tokenizer(ALPHABET, "<unk>", additional_special_tokens=SPECIAL[2:6])
    characters.chat_template = (Path(trl.__file__).parent / "chat_templates/qwen3.jinja").read_text()
    return characters


def digits(completions, **kwargs):
    """The share of digits."""
    texts = [completion[-1]["content"] for completion in completions]
    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in texts]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("async-server")
    shape = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": 512}
    tiny_model(vocab_size=len(ALPHABET), initializer_range=0.15, **shape).save_pretrained(directory / "model")
    tokenizer().save_pretrained(directory / "model")
    options = "--max-model-len 256 --enable-lora --max-loras 6 --max-lora-rank 8"
    options += " --no-enable-chunked-prefill --max-num-batched-tokens 8192"  # TRL seeds each request
    with running(Server(directory, options, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1")) as started:
        yield started


class Recorder(AsyncCPPOTrainer):
    """Keeps every sample that it takes and every version of the weights that it publishes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.samples, self.versions = [], {}
        get = self.rollout_queue.get

        def record(*args, **kwargs):
            sample = get(*args, **kwargs)
            self.samples.append(sample)
            return sample

        self.rollout_queue.get = record

    def _sync_weight(self):
        super()._sync_weight()
        self.versions[self.model_version] = {n: p.detach().clone() for n, p in self.model.named_parameters()}


def make_trainer(server, directory, peft=LORA, callbacks=None, **fields):
    defaults = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True}
    defaults |= {"save_strategy": "no", "learning_rate": 1e-2, "max_steps": 6, "per_device_train_batch_size": 16}
    defaults |= {"num_generations": 4, "max_completion_length": 12, "vllm_server_base_url": server.address}
    defaults |= {"cppo_delta": 0.05, "cppo_delta_b": 0.005}
    prompts = [[{"role": "user", "content": f"{i}+{i + 1}="}] for i in range(64)]
    return Recorder(
        str(server.directory / "model"),
        digits,
        AsyncCPPOConfig(str(directory), **{**defaults, **fields}),
        Dataset.from_dict({"prompt": prompts}),
        tokenizer(),
        callbacks=callbacks,
        peft_config=peft,
        weight_transfer=None if peft else FileTransfer(server.address, directory / "weights.safetensors"),
    )


@torch.no_grad()
def errors_by_version(trainer, server):
    """For each sample, |log μ of the server - log π of a version| by version, ``(versions, tokens)``, in nats."""
    model = AutoModelForCausalLM.from_pretrained(server.directory / "model", dtype=torch.float32)
    if trainer._lora_sync:
        model = get_peft_model(model, LORA)
    errors = [[] for _ in trainer.samples]
    for weights in trainer.versions.values():
        model.load_state_dict(weights, strict=False)
        for found, sample in zip(errors, trainer.samples, strict=True):
            ids, mask = torch.tensor(sample.input_ids)[None], torch.tensor(sample.completion_mask)[1:].bool()
            logps = model(ids).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])[mask, 0]
            found.append((logps - torch.tensor(sample.old_log_probs)[1:][mask]).abs())
    return [torch.stack(found) for found in errors]


def test_each_sample_is_of_exactly_one_version_of_the_adapter(server, tmp_path):
    trainer = make_trainer(server, tmp_path)
    trainer.train()
    assert trainer._lora_sync
    errors = errors_by_version(trainer, server)
    assert len(errors) >= 6 * 16
    versions = [(found.amax(1) < 1e-4).nonzero().flatten().tolist() for found in errors]
    assert all(len(found) == 1 for found in versions)
    # TRL tags a group when it asks for its first response; a later response may be of newer weights
    newer = [list(trainer.versions)[v] - s.model_version for (v,), s in zip(versions, trainer.samples, strict=True)]
    assert min(newer) == 0
    assert sum(newer) < 0.2 * len(newer)
    rows = trainer.state.log_history[:-1]
    staleness = {name.split("/")[1] for row in rows for name in row if name.startswith("cppo/staleness_")}
    assert len(staleness) >= 2
    assert max(row["cppo/masked"] for row in rows) > 0
    assert max(row.get("cppo/rollout_mismatch_nats", 0.0) for row in rows) < 1e-4


class KillServer(TrainerCallback):
    """Kills the server after the fourth update."""

    def __init__(self, server):
        self.server = server

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.server.stop(signal.SIGKILL)


def test_a_dead_server_ends_the_run_and_the_same_command_goes_on(server, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "max_staleness": 2}
    trainer = make_trainer(server, tmp_path, callbacks=[KillServer(server)], **fields)
    with pytest.raises(RunError, match="no longer answers, after 4 updates"):
        trainer.train()
    checkpoint, skipped = last_checkpoint(str(tmp_path))
    assert (checkpoint.name, skipped) == ("checkpoint-3", [])
    server.start()
    again = make_trainer(server, tmp_path, **fields)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == 8
    assert min(again.versions) > 3  # the names of the adapters go on counting
    # a further run from the start, against the server that holds the adapters of this one
    fresh = make_trainer(server, tmp_path / "fresh", max_steps=2)
    fresh.train()
    assert fresh.state.global_step == 2


def test_a_recipe_trains_against_the_server(server, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cppo-trl"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    prompts = [[{"role": "user", "content": f"{i}+{i + 1}="}] for i in range(64)]
    Dataset.from_dict({"prompt": prompts}).to_json(tmp_path / "data/train.jsonl")
    fields = {"asynchronous": True, "model_name_or_path": str(server.directory / "model"), "report_to": "none"}
    fields |= {"use_peft": True, "lora_r": 8, "lora_target_modules": "all-linear"}
    fields |= {"reward_funcs": ["tests.vllm.test_async.digits"]}
    fields |= {"dataset_name": "data", "output_dir": "out", "max_steps": 3, "per_device_train_batch_size": 8}
    fields |= {"vllm_server_base_url": server.address, "num_generations": 4, "max_completion_length": 12, "seed": 3}
    fields |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-2, "save_steps": 3}
    Path("async.yaml").write_text(yaml.safe_dump(fields))
    main(["train", "--config", "async.yaml"])
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    assert sum("cppo/masked" in row for row in history) == 3
    assert Path("out/adapter_model.safetensors").is_file()
    main(["train", "--config", "async.yaml", "--max_steps", "4", "--resume_from_checkpoint", "true"])
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    assert sum("cppo/masked" in row for row in history) == 4


def test_with_all_weights_through_a_file_each_token_is_of_one_version(server, tmp_path):  # last: it changes the base
    trainer = make_trainer(server, tmp_path, peft=None, learning_rate=3e-3)
    trainer.train()
    assert not trainer._lora_sync
    for found in errors_by_version(trainer, server):
        best = found.argmin(0)
        assert found.amin(0).max() < 1e-4
        assert (best.diff() >= 0).all() or found.amax(1).min() < 1e-4  # a sync in its middle: later tokens are newer
    assert len({sample.model_version for sample in trainer.samples}) >= 2
