"""The rows of the annotators that are networks, for the table of kinds of hints."""

from functools import partial
from typing import Any

from controlkit.annotators.kinds import HintKind, maker, register
from controlkit.annotators.networks import dwpose, hed, mediapipe, poses

_HED: dict[str, Any] = {"weights": hed.weights, "lack": hed.lack}
_BEST: dict[str, Any] = {"weights": poses.weights, "lack": poses.lack, "extra": mediapipe.EXTRA}

for _kind in (
    # Each is a type of a ControlNet-Union by itself.
    HintKind("hed", hed.hed, "softedge", ("softedge_hed",), metric="ms_ssim", union_type=2, folders=("hed",), **_HED),
    HintKind("pidi", None, "softedge", metric="ms_ssim", union_type=2),
):
    register(_kind)

for _kind in (
    maker("hed_safe", partial(hed.hed, safe=1.0), of="softedge", aliases=("softedge_hedsafe",), **_HED),
    maker("scribble_hed", hed.scribble_hed, of="scribble", aliases=("fake_scribble",), **_HED),
    # The first of a family serves controls of which nothing else is said: bodies alone, which every control knows.
    maker("openpose_body", partial(poses.openpose, hands=0.0, face=0.0), of="pose", **_BEST),
    maker("openpose_hand", partial(poses.openpose, face=0.0), of="pose", **_BEST),
    maker("openpose_face", partial(poses.openpose, hands=0.0), of="pose", **_BEST),
    maker("openpose_faceonly", partial(poses.openpose, body=0.0, hands=0.0), of="pose", **_BEST),
    maker("openpose_full", poses.openpose, of="pose", **_BEST),
    maker("dwpose", poses.dwpose_pose, of="pose", aliases=("dw_openpose_full",), weights=dwpose.weights,
          lack=dwpose.lack, extra=dwpose.EXTRA, modules=(dwpose.MODULE,)),
    maker("mediapipe_pose", poses.mediapipe_pose, of="pose", weights=mediapipe.weights, lack=mediapipe.lack,
          extra=mediapipe.EXTRA, modules=(mediapipe.MODULE,)),
):  # fmt: skip
    register(_kind)
