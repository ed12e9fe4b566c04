"""Poses of people as hints: found by one of several networks, drawn by ``people`` as OpenPose draws them.

OpenPose's own networks are left out: their licence allows no commercial use.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from controlkit.annotators.networks import dwpose, mediapipe, vitpose
from controlkit.annotators.options import Switch
from controlkit.annotators.people import Person, draw_people
from controlkit.annotators.tiles import shortened


def _drawn(finder: Any, pictures: Sequence[np.ndarray], body: float, hands: float, face: float) -> list[np.ndarray]:
    shown = {"body": body >= 0.5, "hands": hands >= 0.5, "face": face >= 0.5}
    found = [finder.find_people(picture, shown["hands"], shown["face"]) for picture in pictures]
    return [draw_people(people, p.shape[:2], **shown) for people, p in zip(found, pictures, strict=True)]


@shortened
def mediapipe_pose(
    pictures: Sequence[np.ndarray], device: str, body: Switch = 1.0, hands: Switch = 1.0, face: Switch = 1.0
) -> list[np.ndarray]:
    """People found by MediaPipe's models. ``body``, ``hands``, ``face``: whether those points are drawn."""
    return _drawn(mediapipe, pictures, body, hands, face)


@shortened
def dwpose_pose(
    pictures: Sequence[np.ndarray], device: str, body: Switch = 1.0, hands: Switch = 1.0, face: Switch = 1.0
) -> list[np.ndarray]:
    """People found by DWPose. ``body``, ``hands``, ``face``: whether those points are drawn."""
    return _drawn(dwpose, pictures, body, hands, face)


@shortened
def vitpose_pose(pictures: Sequence[np.ndarray], device: str) -> list[np.ndarray]:
    """Bodies found by ViTPose, which knows neither hands nor faces."""
    found = vitpose.find_people(pictures, device)
    return [draw_people(people, p.shape[:2]) for people, p in zip(found, pictures, strict=True)]


@shortened
def openpose(
    pictures: Sequence[np.ndarray], device: str, body: Switch = 1.0, hands: Switch = 1.0, face: Switch = 1.0
) -> list[np.ndarray]:
    """People found by the best network that is here. ``body``, ``hands``, ``face``: whether those points are drawn."""
    return _drawn(_best(), pictures, body, hands, face)


def _best() -> Any:
    """The module of the best network that is here: DWPose where its files are, else MediaPipe's."""
    return mediapipe if dwpose.lack() else dwpose


def lack() -> str:
    """A sentence on how to get a network that finds people; "" where one is here or can be fetched."""
    return _best().lack()


def weights() -> str:
    """The digest of the weights of the best network that is here."""
    return _best().weights()


def people_in(picture: np.ndarray, hands: bool = True, face: bool = True) -> list[Person]:
    """The people in a picture, uint8 (H, W, 3), by the best network that is here, for ``people.people_to_json``."""
    found: list[Person] = _best().find_people(picture, hands, face)
    return found
