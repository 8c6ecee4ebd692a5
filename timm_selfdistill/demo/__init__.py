"""A page on which a model shows what each exit says of a picture; all but `page.py` works without gradio."""

from .answers import Answers, Classifier, Leaving
from .recorded import Recorded, read_recorded
from .space import SPACE_FILES, stage_space
from .views import Views

__all__ = ["SPACE_FILES", "Answers", "Classifier", "Leaving", "Recorded", "Views", "read_recorded", "stage_space"]
