"""How each task is asked: one template, and wordings of which no split sees another's.

Experts train on the template, the training wordings and the bare text, so that neither they nor a router can lean on
one sentence. Validation and test use wordings that training never shows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BARE = ""


@dataclass(frozen=True)
class Wordings:
    """The instructions of one task: the template and, per split, others that mean the same."""

    template: str
    train: tuple[str, ...]
    valid: tuple[str, ...]
    test: tuple[str, ...]

    def versions(self, split: str) -> Mapping[str, Sequence[str]]:
        """Return the instructions of each version of a split; the one named like the split is the main one."""
        if split == "train":
            return {"train": (self.template, *self.train, BARE)}
        main = self.valid if split == "valid" else self.test
        return {split: main, f"{split}-template": (self.template,), f"{split}-bare": (BARE,)}


WORDINGS = {
    "maths": Wordings(
        template="Solve this problem. Reply with the number only.",
        train=(
            "Work out the answer to this word problem and give just the number.",
            "What is the result? Answer with a number, nothing else.",
            "Read the story and tell me how many. Only the number, please.",
            "Calculate. Write one number.",
            "Please do this sum for me; I need the number alone.",
            "Here is a small arithmetic exercise. State the result as a number.",
        ),
        valid=("Find the number asked for. No explanation.", "Can you compute this? Just the final figure."),
        test=(
            "How would you answer this school exercise? A number is enough.",
            "Give the quantity asked for below, without words.",
            "I am stuck on my homework. Which number is correct?",
            "Determine the value and print it.",
            "One number as the reply to this puzzle, please.",
            "Answer the question at the end of the text with digits only.",
        ),
    ),
    "sarcasm": Wordings(
        template="Is this headline sarcastic? Reply with yes or no.",
        train=(
            "Does this news title mean the opposite of what it says? Answer yes or no.",
            "Say yes if the following headline is satire and no if it is serious.",
            "Was this written by a satirical paper? yes or no",
            "Yes or no: the headline below is ironic.",
            "Decide whether this title is a joke. Reply yes or no.",
            "Could this line come from a comedy news site? One word, yes or no.",
        ),
        valid=(
            "Is the tone of this headline mocking? yes/no",
            "Tell me if this title is sarcasm; answer yes or no.",
        ),
        test=(
            "Would you call the next headline tongue in cheek? Just yes or no.",
            "Real reporting gets a no, satire gets a yes. Which is it?",
            "Please judge: does the author of this title make fun of the news? Yes or no.",
            "Headline check. Sarcastic or not? Use yes or no.",
            "Is the writer being ironic here? Answer with a single yes or no.",
            "Am I looking at parody? Reply only yes or no.",
        ),
    ),
    "language": Wordings(
        template="Which language are these names written in? Reply with the language only.",
        train=(
            "Name the language of the following words.",
            "In what language are these terms? One word.",
            "Identify the tongue that these words belong to. Give its English name.",
            "These are names of places or months. What language is that?",
            "Tell me the language of this list and nothing else.",
            "What do you call the language used here? Answer in English.",
        ),
        valid=("Say which language this is.", "Detect the language of these names. Reply with its name."),
        test=(
            "Someone gave me this list. Which language is it?",
            "Recognise the language and write its English name.",
            "Where would people say it like this? Answer with the language.",
            "I found these words on a map. What language might they be?",
            "Classify the words below by language. Just the name of it.",
            "Guess the language these expressions come from.",
        ),
    ),
    "sentiment": Wordings(
        template="Is this film review positive or negative? Reply with one word.",
        train=(
            "What does the critic think of the movie? Answer positive or negative.",
            "Label the following sentence from a review as positive or negative.",
            "Did the reviewer like it? Say positive or negative.",
            "Sentiment of this review, in one word: positive or negative.",
            "Choose between positive and negative for this comment on a film.",
            "Here is what someone wrote about a movie. Positive or negative?",
        ),
        valid=(
            "Is the writer pleased with the picture? positive/negative",
            "Classify the opinion below: positive or negative.",
        ),
        test=(
            "How did this film go down with the critic: positive or negative?",
            "One word for the mood of this movie notice, positive or negative.",
            "Thumbs up is positive, thumbs down is negative. Which one fits?",
            "Tell me whether the verdict below is positive or negative.",
            "Would this quote make you buy a ticket? Answer positive for yes, negative for no.",
            "Rate the attitude of the author as positive or negative.",
        ),
    ),
}


def ask(instruction: str, text: str) -> str:
    """Return the prompt: instruction and text, or the text alone."""
    return f"{instruction}\n\n{text}" if instruction else text


def instruction_of(prompt: str) -> str:
    """Return the instruction that a prompt opens with, or the empty string of a bare text."""
    head, separator, _ = prompt.partition("\n\n")
    return head if separator else BARE
