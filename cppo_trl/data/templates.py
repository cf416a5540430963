r"""Prompt templates by name: how a problem is put to the model, and where its answer is asked for."""

from dataclasses import dataclass

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Template:
    """Texts of a conversational prompt.

    Attributes:
        user: The user's message; ``{problem}`` stands for the problem.
        system: The system message, or None for none.
    """

    user: str
    system: str | None = None

    def render(self, problem: str) -> Messages:
        """Return the messages for a problem."""
        # not str.format: the braces of \boxed{} are meant
        messages = [{"role": "user", "content": self.user.replace("{problem}", problem)}]
        return messages if self.system is None else [{"role": "system", "content": self.system}, *messages]


TEMPLATES = {
    # word for word what DAPO-Math-17k's own prompts hold
    "dapo": Template(
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    ),
    # as the model cards of Qwen2.5-Math and Qwen3 advise
    "boxed": Template("{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."),
    # for models that do not think of themselves; goes with `cppo_trl.rewards.format_reward`
    "thinking": Template(
        "{problem}\n\nPut your final answer within \\boxed{}.",
        system="First think the problem through, then answer. Write your thoughts between <think> and </think>, and "
        "the answer after them: <think>\nyour thoughts\n</think>\nyour answer",
    ),
    "plain": Template("{problem}"),
}


def template_named(name: str) -> Template:
    """Return a template.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}; got {name!r}")
    return TEMPLATES[name]


def strip_template(template: Template, text: str) -> str:
    """Return the problem that the template's user message was made of; any other text is returned as it is."""
    before, after = template.user.split("{problem}")
    text = text.strip()
    if text.startswith(before) and text.endswith(after):
        text = text[len(before) : len(text) - len(after)]
    return text.strip()
