"""What a job answers with a sentence instead of a traceback: input that cannot be used, as its readers say it."""

from neurostorm.downstream.labels import LabelError
from neurostorm.downstream.reid import ReidError
from neurostorm.downstream.splits import SplitError
from neurostorm.model.hub import HubError
from neurostorm.model.reference import ReferenceMismatch
from neurostorm.object_store import PlaceError
from neurostorm.store import StoreError

REFUSALS = (LabelError, SplitError, ReidError, HubError, ReferenceMismatch, PlaceError, StoreError)
