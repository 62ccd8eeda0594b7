"""Parcels as the content of Flower's messages, and back."""

from flwr.app import ConfigRecord, Message, RecordDict

from spryfl.runtime.parcels import Parcel

HEADER, TENSORS, ABOUT = "header", "tensors", "about"


def to_content(parcel: Parcel, about: str = "") -> RecordDict:
    """A message's content; the tensors are a record of their own, stored once for all clients that get the same."""
    return RecordDict(
        {HEADER: ConfigRecord({HEADER: parcel.header, ABOUT: about}), TENSORS: ConfigRecord({TENSORS: parcel.tensors})}
    )


def parcel_of(message: Message) -> Parcel:
    """The parcel of a message from another machine; what is missing or of another type is empty."""
    header, tensors = _field(message, HEADER, HEADER), _field(message, TENSORS, TENSORS)
    return Parcel(header if isinstance(header, str) else "", tensors if isinstance(tensors, bytes) else b"")


def about_of(message: Message) -> str:
    """What the server says about the run."""
    return str(_field(message, HEADER, ABOUT))


def _field(message: Message, record: str, name: str) -> object:
    return message.content.config_records.get(record, ConfigRecord()).get(name)
