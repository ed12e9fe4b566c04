"""The rows of the annotators that are networks, for the table of kinds of hints."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from controlkit.annotators.kinds import HintKind, maker, register
from controlkit.annotators.networks import (
    depth,
    drawing,
    dwpose,
    facemesh,
    hed,
    mediapipe,
    mlsd,
    normalbae,
    pidinet,
    poses,
    pretrained,
    segmentation,
    vitpose,
)
from controlkit.annotators.networks.weights import PublicFile
from controlkit.annotators.options import Threshold

_HED: dict[str, Any] = {"weights": hed.weights, "lack": hed.lack}
_MEDIAPIPE: dict[str, Any] = {
    "weights": mediapipe.weights, "lack": mediapipe.lack, "extra": mediapipe.EXTRA, "modules": (mediapipe.MODULE,),
}  # fmt: skip


def _of(file: PublicFile) -> dict[str, Any]:
    """The fields of a row that say which weights it needs."""
    return {"weights": file.digest, "lack": file.lack}


def _best_of(models: Sequence[pretrained.Pretrained]) -> dict[str, Any]:
    """The same fields for networks of which the best one that is here is used."""
    return {"weights": partial(pretrained.weights, models), "lack": partial(pretrained.lack, models)}


_BEST: dict[str, Any] = {"weights": poses.weights, "lack": poses.lack, "extra": mediapipe.EXTRA}

for _kind in (
    # Each is a type of a ControlNet-Union by itself.
    HintKind("hed", hed.hed, "softedge", ("softedge_hed",), lines=True, metric="ms_ssim", union_type=2,
             folders=("hed",), **_HED),
    HintKind("pidi", pidinet.pidi, "softedge", ("softedge_pidinet", "pidinet"), lines=True, metric="ms_ssim",
             union_type=2, **_of(pidinet.PUBLIC)),
    HintKind("ted", family="softedge", lines=True, metric="ms_ssim", union_type=2),
    # By itself: what ControlNetMediaPipeFace reads.
    HintKind("mediapipe_face", facemesh.mediapipe_face, resize="nearest", **_MEDIAPIPE,
             thresholds=(Threshold("faces", "Max Faces", 1, 1, 10),
                         Threshold("sure", "Min Face Confidence", 0.5, 0.01, 1, 0.01))),
):  # fmt: skip
    register(_kind)

for _kind in (
    maker("hed_safe", partial(hed.hed, safe=1.0), of="softedge", aliases=("softedge_hedsafe",), **_HED),
    maker("pidi_safe", partial(pidinet.pidi, safe=1.0), of="softedge", aliases=("softedge_pidisafe", "pidinet_safe"),
          **_of(pidinet.PUBLIC)),
    maker("scribble_pidinet", pidinet.scribble_pidi, of="scribble", aliases=("pidinet_scribble",),
          **_of(pidinet.PUBLIC)),
    maker("sketch_pidi", pidinet.sketch_pidi, of="scribble", aliases=("t2ia_sketch_pidi", "pidinet_sketch"),
          **_of(pidinet.PUBLIC)),
    maker("lineart_fine", drawing.lineart, of="lineart", aliases=("lineart_realistic",), **_of(drawing.FINE)),
    maker("lineart_coarse", drawing.lineart_coarse, of="lineart", **_of(drawing.COARSE)),
    maker("lineart_anime", drawing.lineart_anime, of="lineart", **_of(drawing.ANIME)),
    maker("mlsd_large", mlsd.mlsd_large, of="mlsd", **_of(mlsd.PUBLIC),
          thresholds=(Threshold("score", "MLSD Value Threshold", 0.1, 0.01, 2, 0.01),
                      Threshold("distance", "MLSD Distance Threshold", 0.1, 0.01, 20, 0.01))),
    maker("depth_anything_v2", partial(depth.depth, depth.ANYTHING_V2), of="depth",
          **_best_of(depth.ANYTHING_V2)),
    maker("depth_anything", partial(depth.depth, depth.ANYTHING), of="depth", **_best_of(depth.ANYTHING)),
    maker("depth_midas", partial(depth.depth, depth.MIDAS), of="depth", aliases=("midas",),
          **_best_of(depth.MIDAS)),
    maker("depth_zoe", partial(depth.depth, depth.ZOE), of="depth", **_best_of(depth.ZOE)),
    maker("normal_bae", normalbae.normal_bae, of="normal", aliases=("normalbae",), **_of(normalbae.PUBLIC)),
    maker("normal_depth_anything", partial(depth.normal, depth.ANYTHING_V2), of="normal",
          **_best_of(depth.ANYTHING_V2)),
    maker("normal_midas", partial(depth.normal, depth.MIDAS), of="normal", aliases=("normal_map",),
          thresholds=(Threshold("background", "Normal Background Threshold", 0.4, 0, 1, 0.01),),
          **_best_of(depth.MIDAS)),
    maker("oneformer_ade20k", partial(segmentation.segmentation, segmentation.ONEFORMER), of="seg",
          aliases=("seg_ofade20k",), metric="miou_ade20k", extra=segmentation.EXTRA, modules=(segmentation.MODULE,),
          **_best_of(segmentation.ONEFORMER)),
    maker("upernet_ade20k", partial(segmentation.segmentation, segmentation.UPERNET), of="seg",
          aliases=("seg_ufade20k", "segmentation"), metric="miou_ade20k", **_best_of(segmentation.UPERNET)),
    maker("scribble_hed", hed.scribble_hed, of="scribble", aliases=("fake_scribble",), **_HED),
    # The first of a family serves controls of which nothing else is said: bodies alone, which every control knows.
    maker("openpose_body", partial(poses.openpose, hands=0.0, face=0.0), of="pose", **_BEST),
    maker("openpose_hand", partial(poses.openpose, face=0.0), of="pose", **_BEST),
    maker("openpose_face", partial(poses.openpose, hands=0.0), of="pose", **_BEST),
    maker("openpose_faceonly", partial(poses.openpose, body=0.0, hands=0.0), of="pose", **_BEST),
    maker("openpose_full", poses.openpose, of="pose", **_BEST),
    maker("dwpose", poses.dwpose_pose, of="pose", aliases=("dw_openpose_full",), weights=dwpose.weights,
          lack=dwpose.lack, extra=dwpose.EXTRA, modules=(dwpose.MODULE,)),
    maker("vitpose", poses.vitpose_pose, of="pose", weights=vitpose.weights, lack=vitpose.lack),
    maker("mediapipe_pose", poses.mediapipe_pose, of="pose", **_MEDIAPIPE),
):  # fmt: skip
    register(_kind)
