r"""The built-in task: sums worked out step by step, with the tokenizer and the small model that learn it.

A prompt is ``3+5+9=``; its worked answer ``3+5=8;8+9=17;\boxed{17}``. Everything is generated, nothing downloaded.
"""

import random
from pathlib import Path

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

ALPHABET = "0123456789+=;\\{}bdeox"


def problems(count: int, terms: int, seed: int, exclude: set[str] | None = None) -> Dataset:
    """Distinct sums of ``terms`` digits from 1 to 9.

    Args:
        count: number of problems.
        terms: digits in each sum.
        seed: seed of the random generator.
        exclude: prompts that must not occur, such as those of another split.

    Returns:
        A dataset with ``prompt`` (``3+5+9=``) and ``solution`` (``17``), both strings.

    Raises:
        ValueError: if there are not that many distinct sums.
    """
    seen = set(exclude or ())
    if count + len(seen) > 9**terms:
        raise ValueError(f"count={count} with {len(seen)} excluded: there are only {9**terms} sums of {terms} terms.")
    generator = random.Random(seed)
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        digits = [generator.randint(1, 9) for _ in range(terms)]
        prompt = "+".join(map(str, digits)) + "="
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt, "solution": str(sum(digits))})
    return Dataset.from_list(rows)


def splits(train: int, test: int, terms: int, seed: int) -> tuple[Dataset, Dataset]:
    """So many `problems` to train on and so many others that are held out."""
    held_out = problems(test, terms, seed)
    return problems(train, terms, seed + 1, set(held_out["prompt"])), held_out


def demonstrations(dataset: Dataset, error_rate: float, seed: int, forgotten_carry: float = 0.0) -> Dataset:
    """Worked answers for supervised training, with two kinds of errors.

    Each step is wrong by 1 to 3 with probability ``error_rate``. A step that adds 9 and carries is instead too small
    by 10 with probability ``forgotten_carry``. Later steps continue from the wrong result, so the answer is wrong too,
    unless errors cancel out. A model trained on these answers is often wrong when it samples and nearly always right
    when it decodes greedily, except where a forgotten carry is more frequent than the right result.

    Args:
        dataset: Problems, as made by `problems`.
        error_rate: Probability of a random error in a step.
        seed: Seed of the errors.
        forgotten_carry: Probability that a carry is forgotten in a step that adds 9.

    Returns:
        A dataset with ``prompt`` and ``completion``.
    """
    generator = random.Random(seed)

    def work_out(prompt: str) -> str:
        first, *digits = map(int, prompt.rstrip("=").split("+"))
        total, steps = first, []
        for digit in digits:
            result = total + digit
            if forgotten_carry and digit == 9 and total % 10 and generator.random() < forgotten_carry:
                result -= 10
            elif generator.random() < error_rate:
                result = max(result + generator.choice((-3, -2, -1, 1, 2, 3)), 0)
            steps.append(f"{total}+{digit}={result};")
            total = result
        return "".join(steps) + f"\\boxed{{{total}}}"

    return Dataset.from_list([{"prompt": p, "completion": work_out(p)} for p in dataset["prompt"]])


def tokenizer() -> PreTrainedTokenizerFast:
    """A character-level tokenizer of the task's alphabet."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *ALPHABET])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")


def model(vocabulary: PreTrainedTokenizerFast, hidden: int = 96, layers: int = 2) -> PreTrainedModel:
    """A Qwen3-architecture model with random weights: 0.22 M parameters at the defaults."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(vocabulary),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden // 4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=vocabulary.pad_token_id,
            eos_token_id=vocabulary.eos_token_id,
            bos_token_id=None,
        )
    )


def warm_start(
    directory: Path,
    *,
    terms: int,
    error_rate: float,
    seed: int,
    exclude: set[str],
    steps: int = 600,
    hidden: int = 96,
    forgotten_carry: float = 0.0,
) -> None:
    """Train the model on erroneous demonstrations with TRL's `SFTTrainer` and save it to ``directory``.

    Args:
        directory: where model and tokenizer go; it appears when it is complete.
        terms: digits in each sum.
        error_rate: as in `demonstrations`.
        forgotten_carry: as in `demonstrations`.
        seed: seed of data, weights and data order.
        exclude: prompts that must not be seen.
        steps: optimizer steps of 64 demonstrations each.
        hidden: width of the model.
    """
    unfinished = directory.with_name(f"{directory.name}.tmp")
    characters = tokenizer()
    data = problems(min(20_000, 9**terms // 2), terms, seed + 1, exclude)
    config = SFTConfig(
        output_dir=str(unfinished),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=100,
        save_strategy="no",
        report_to=[],
    )
    set_seed(seed)
    trainer = SFTTrainer(
        model=model(characters, hidden),
        args=config,
        train_dataset=demonstrations(data, error_rate, seed + 2, forgotten_carry),
        processing_class=characters,
    )
    trainer.train()
    trainer.save_model(str(unfinished))
    unfinished.rename(directory)
