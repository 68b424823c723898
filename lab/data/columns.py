"""The columns and classes of each kind of row: preference pairs, instructions, problems."""

INSTRUCTION_COLUMNS = ("instruction", "input", "output")  # Alpaca's

LABELS = {
    "A": "winner_model_a",
    "B": "winner_model_b",
    "tie": "winner_tie",
}  # class order; the file's columns
TEXTS = ("prompt", "response_a", "response_b")
PAIR_COLUMNS = ("id", *TEXTS, *LABELS.values())
SOFT = ("prob_a", "prob_b", "prob_tie")  # probabilities of the classes, beside a winner or instead of one
SWAP = (1, 0, 2)  # classes A, B, tie when A and B change places

PROBLEM_COLUMNS = ("Problem", "options", "correct")  # MathQA's; Rationale, formulas and category are not read
LETTERS = "abcde"
