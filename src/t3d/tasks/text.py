"""Free text, which has references but no right or wrong: summaries, dialogue turns, and continuations of plain text.

Evaluate with `eval.text=true` for BLEU, ROUGE-L and the like (`t3d.evaluation.text`).
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from t3d.errors import T3DError
from t3d.tasks.base import Problem, Verdict, register
from t3d.tasks.chat import read_chat
from t3d.tasks.files import FileTask

PROMPT_WORDS = 32


@register("text")
class Text(FileTask):
    """Records with a question (an article, the turns so far, a chat) and optionally a reference text; nothing is
    verified."""

    question_fields = ("question", "article", "document", "dialogue", "prompt", "text", "messages", "conversations")
    answer_fields = ("answer", "highlights", "summary", "response", "reference")

    def problem(self, record: dict, id: str, where: str) -> Problem:
        record, messages, reply = read_chat(record, self.config.question_field, where)
        problem = super().problem(record, id, where)
        return replace(problem, messages=messages, answer=problem.answer or reply)

    def judge(self, text: str, problem) -> Verdict:
        return Verdict(None, text.strip())


@register("continuation")
class Continuation(Text):
    """A plain text file (WikiText, PTB, a book): of every paragraph, its first 32 words ask for the rest.

    A paragraph is what stands between blank lines, or a line where there are none. Headings (` = Title = `) and
    paragraphs with no more than twice the prompt's words are left out.
    """

    def _source(self, split: str) -> tuple[str, str, Iterable[tuple[str, dict]]]:
        path = self.config.path if split == "train" else self.config.eval_path or self.config.path
        if path is None:
            raise T3DError("task 'continuation' needs a plain text file: set task.path=FILE")
        return path, Path(path).name.split(".")[0], _paragraphs(Path(path))


def _paragraphs(path: Path) -> list[tuple[str, dict]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise T3DError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise T3DError(f"{path} is not UTF-8 text ({error.reason})") from error
    found = []
    between = r"\n\s*\n" if re.search(r"\S[^\n]*\n[^\n]*\S", text) and re.search(r"\n\s*\n", text) else r"\n"
    for number, paragraph in enumerate(re.split(between, text), start=1):
        words = paragraph.split()
        if len(words) > 2 * PROMPT_WORDS and not (words[0] == words[-1] == "="):
            prompt, rest = " ".join(words[:PROMPT_WORDS]), " ".join(words[PROMPT_WORDS:])
            found.append((f"paragraph {number}", {"question": prompt, "answer": rest}))
    return found
