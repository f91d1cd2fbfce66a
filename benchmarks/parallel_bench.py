"""How often independent draws of several tokens make a valid answer to the kinds of `parallel_bench`.

    python benchmarks/parallel_bench.py

prints a Markdown table: accuracy in percent by tokens per step, exact, by enumeration of all valid answers.
"""

from t3d.tasks.parallel_bench import KINDS, answers, expected_accuracy, problem
from t3d.tasks.tokenizer import pieces

PER_STEP = 1, 2, 4, 8


def main() -> None:
    print("| kind | size | tokens | valid answers |", " | ".join(map(str, PER_STEP)), "|")
    print("|", " | ".join(["---"] * (4 + len(PER_STEP))), "|")
    for name, kind in KINDS.items():
        found = list(answers(problem(name, kind.size, 0, "train", 0)))
        reached = (f"{100 * expected_accuracy(name, kind.size, k):.1f}" for k in PER_STEP)
        print(f"| `{name}` | {kind.size} | {len(pieces(found[0]))} | {len(found)} |", " | ".join(reached), "|")


if __name__ == "__main__":
    main()
