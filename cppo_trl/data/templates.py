r"""Prompt templates by name: how a problem is put to the model and where its answer is asked for."""

from dataclasses import dataclass

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Template:
    """The texts of a conversational prompt.

    Attributes:
        user: User message; ``{problem}`` is replaced by the problem.
        system: System message, or None.
    """

    user: str
    system: str | None = None

    def render(self, problem: str) -> Messages:
        """Return the messages for a problem."""
        # str.format would trip over the braces of \boxed{}
        messages = [{"role": "user", "content": self.user.replace("{problem}", problem)}]
        return messages if self.system is None else [{"role": "system", "content": self.system}, *messages]


TEMPLATES = {
    # verbatim from the prompts of DAPO-Math-17k
    "dapo": Template(
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    ),
    # as recommended by the model cards of Qwen2.5-Math and Qwen3
    "boxed": Template("{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."),
    # for models that do not reason unprompted; pairs with `cppo_trl.rewards.format_reward`
    "thinking": Template(
        "{problem}\n\nPut your final answer within \\boxed{}.",
        system="First think the problem through, then answer. Write your thoughts between <think> and </think>, and "
        "the answer after them: <think>\nyour thoughts\n</think>\nyour answer",
    ),
    "plain": Template("{problem}"),
}


def template_named(name: str) -> Template:
    """Return the template of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}; got {name!r}")
    return TEMPLATES[name]


def strip_template(template: Template, text: str) -> str:
    """Return the problem inside a rendered user message, or the stripped text if the template does not match."""
    before, after = template.user.split("{problem}")
    text = text.strip()
    if text.startswith(before) and text.endswith(after):
        text = text[len(before) : len(text) - len(after)]
    return text.strip()
