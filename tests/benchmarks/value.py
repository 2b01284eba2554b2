"""The cost of a value head in step time and peak memory.

    python tests/benchmarks/value.py
"""

import argparse

from training_cost import add_arguments, compare


def main() -> None:
    """Compare runs with and without a value head, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--value_epochs", type=int, default=32)
    arguments = parser.parse_args()
    head = {"advantage_estimator": "group_gae", "value_epochs": arguments.value_epochs}
    compare({"advantage_estimator": "group"}, head, "a value head", arguments)


if __name__ == "__main__":
    main()
