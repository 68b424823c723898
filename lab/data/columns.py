"""The columns and classes of each kind of row: preference pairs, instructions, problems."""

INSTRUCTION_COLUMNS = ("instruction", "input", "output")  # Alpaca's

LABELS = {
    "A": "winner_model_a",
    "B": "winner_model_b",
    "tie": "winner_tie",
}  # class order; the file's columns
TEXTS = ("prompt", "response_a", "response_b")
PAIR_COLUMNS = ("id", *TEXTS, *LABELS.values())

PROBLEM_COLUMNS = ("Problem", "options", "correct")  # MathQA's; Rationale, formulas and category are not read
LETTERS = "abcde"
