"""What a judge's grades and duels say: means with intervals, win rates, the lines of the terminal."""

from collections import defaultdict

import numpy as np

from lab.compare.difference import FEWEST
from lab.compare.responses import group_of
from lab.measure.statistics import bootstrap, plus_minus


def summary(rows, grades) -> dict:
    """Summary of a judge's grades. `grades`: for each row a list, one per repeat, None
    where a reply had none."""
    read = [[grade for grade in row_grades if grade is not None] for row_grades in grades]
    counted = [i for i, row_grades in enumerate(read) if row_grades]
    means = np.array([np.mean(read[i]) for i in counted])
    groups = [group_of(row) for row in rows]
    figures = {"rows": len(rows), "graded": len(counted)} | mean_and_interval(means, groups, counted)
    figures["empty"] = sum(not row["model_response"].strip() for row in rows)
    figures["unreadable"] = sum(grade is None for row_grades in grades for grade in row_grades)
    asked = [row_grades for row, row_grades in zip(rows, read, strict=True) if row["model_response"].strip()]
    spread = [np.var(row_grades, ddof=1) for row_grades in asked if len(row_grades) > 1]
    figures["noise"] = float(np.sqrt(np.mean(spread))) if spread else None  # s.d. of one grade of one answer
    by_category = defaultdict(list)
    for place, i in enumerate(counted):
        if rows[i].get("category"):
            by_category[str(rows[i]["category"])].append((place, i))
    figures["by_category"] = {
        name: {"rows": len(some)}
        | mean_and_interval(means[[place for place, _ in some]], groups, [i for _, i in some])
        for name, some in sorted(by_category.items())
    }
    figures["grades"] = [
        {"group": g, "grades": row_grades} for g, row_grades in zip(groups, grades, strict=True)
    ]
    return figures


def mean_and_interval(means, groups, counted) -> dict:
    if not len(means):
        return {"score": None, "score_interval": None}
    shares = bootstrap(means[:, None] / 100, [groups[i] for i in counted])
    return {"score": float(means.mean()), "score_interval": (100 * shares[0]).tolist()}


def lines_of_score(name, scored) -> list[str]:
    """Lines for the terminal on what judge.score returns."""
    if scored["score"] is None:
        return [f"{name}  no grade could be read of {scored['judge']}: {words_on_missing(scored, 'grade')}"]
    score = plus_minus(scored["score"], scored["score_interval"], 2)
    counts = f"{scored['graded']} of {scored['rows']} answers, {scored['empty']} empty"
    lines = [f"{name}  {scored['judge']}  {score} of 100  {counts}"]
    if scored["unreadable"]:
        lowest = np.mean(
            [np.mean([grade or 0 for grade in row_grades["grades"]]) for row_grades in scored["grades"]]
        )
        lines.append(f"  {words_on_missing(scored, 'grade')}; counted as 0 the mean would be {lowest:.2f}")
    if scored["noise"] is not None:
        lines.append(
            f"  the judge's own noise: {scored['noise']:.1f} between {scored['repeats']} grades of one answer"
        )
    for category, part in scored["by_category"].items():
        figure = plus_minus(part["score"], part["score_interval"], 2)
        lines.append(f"  {category}: {figure}, {part['rows']} answers")
    return lines


def words_on_missing(figures, what) -> str:
    """How many replies hold no grade (or verdict), and how many questions have no reply."""
    unanswered = figures.get("unanswered", 0)
    counts = {
        f"replies hold no {what}": figures["unreadable"] - unanswered,
        "questions have no reply": unanswered,
    }
    return ", ".join(f"{count} {words}" for words, count in counts.items() if count)


def duel_figures(pairs, where, verdicts) -> dict:
    """Rates of a duel with intervals. `where`: (pair, place of the first run) of each verdict."""
    wins, places, firsts, longers = defaultdict(list), defaultdict(set), [], []
    for (i, place), verdict in zip(where, verdicts, strict=True):
        if verdict is None:
            continue
        places[i].add(place)
        wins[i].append(0.5 if verdict == "tie" else float(verdict == place))
        if verdict != "tie":
            firsts.append((i, verdict == "A"))
            a, b = (len(row["model_response"].strip()) for row in pairs[i])
            if a != b:
                longers.append((i, (verdict == place) == (a > b)))
    both = {i: row_grades for i, row_grades in wins.items() if len(places[i]) == 2}
    groups = [group_of(a) for a, _ in pairs]
    asked = {i for i, _ in where}
    equal = [i for i in range(len(pairs)) if i not in asked]
    outcome = [(i, settled(row_grades)) for i, row_grades in both.items()] + [(i, 0.5) for i in equal]
    consistent = [(i, len(set(row_grades)) == 1) for i, row_grades in both.items()]
    figures = {"prompts": len(pairs), "equal": len(equal), "unreadable": verdicts.count(None)}
    for name, values in {"wins": outcome, "same_in_both_orders": consistent, "first_place": firsts,
                         "longer": longers}.items():  # fmt: skip
        figures[name] = figures[f"{name}_interval"] = None
        if values:
            column = np.array([[value] for _, value in values], dtype=float)
            figures[name] = float(column.mean())
            figures[f"{name}_interval"] = bootstrap(column, [groups[i] for i, _ in values]).tolist()[0]
    return figures | {"outcomes": [{"group": groups[i], "win": win} for i, win in sorted(outcome)]}


def settled(wins) -> float:
    """Outcome of a prompt, 1, 0 or 0.5: a judge that contradicts itself in the other
    order has not decided."""
    mean = float(np.mean(wins))
    return 1.0 if mean > 0.5 and min(wins) >= 0.5 else 0.0 if mean < 0.5 and max(wins) <= 0.5 else 0.5


def lines_of_duel(first, second, d) -> list[str]:
    """Lines for the terminal on what judge.duel returns."""

    def figure(name):
        return "none" if d[name] is None else plus_minus(d[name], d[f"{name}_interval"])

    lines = [
        f"{first} against {second}: wins {figure('wins')} of {len(d['outcomes'])} prompts (ties are halves)"
    ]
    if d["wins"] is not None:
        low, high = d["wins_interval"]
        groups = len({outcome["group"] for outcome in d["outcomes"]})
        verdict = "they cannot be told apart"
        if groups < FEWEST:
            verdict += f" on fewer than {FEWEST} prompts"
        elif low > 0.5 or high < 0.5:
            verdict = "they can be told apart"
        lines.append(f"  {verdict} by {d['judge']}; {d['equal']} pairs of answers are equal")
    lines.append(f"  same verdict in both orders {figure('same_in_both_orders')}")
    lines.append(f"  the one shown first wins {figure('first_place')}, the longer one {figure('longer')}")
    lines += [f"  {words_on_missing(d, 'verdict')}"] if d["unreadable"] else []
    alone = f"  {d['without_partner']} answers to prompts that the other side lacks are left out"
    return [*lines, *([alone] if d["without_partner"] else [])]
