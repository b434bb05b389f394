"""RULER's score: how many of the expected strings were written."""


def score(prediction: str, answers: tuple[str, ...]) -> float:
    """Share (0 to 1) of the answers that the prediction contains, upper and lower case alike.

    Source: string_match_all of RULER, arXiv:2404.06654.
    """
    written = prediction.lower()
    return sum(answer.lower() in written for answer in answers) / len(answers)
