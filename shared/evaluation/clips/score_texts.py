"""Titles and explanations of the headline scores for clips, in reading order."""

from __future__ import annotations

from shared.evaluation.score_texts import ABOUT as ABOUT_PICTURES
from shared.evaluation.score_texts import About

ABOUT = {
    "score": About(
        "Subject × motion × (1 − leakage)",
        "One number for everything that a clip should achieve, as far as it was measured: it should show the subject "
        "and the motion, and should not look like the motion's own clips. This score selects the best checkpoint.",
        "score",
    ),
    "motion_recognised": About(
        "Motion recognized",
        "How often the path in the clip (position, size, view and tilt over time) is nearer to the motion than to any "
        "look-alike or other held-out motion.",
    ),
    "motion_fidelity": About(
        "Motion fidelity",
        "How similar the point tracks are to those in the motion's clips: the best match of each track, averaged over "
        "the tracks in both directions. It is 1 for a clip compared with itself, 0 for a frozen clip, and −1 for the "
        "opposite motion.",
        "score",
    ),
    "false_motion": About(
        "False motion",
        "The same in clips from the same prompts and seeds, except that the motion is loaded but not asked for.",
        better="lower",
    ),
    "leakage": About(
        "Leakage",
        "How much the frames look like those of the motion's clips: each frame's highest cosine with any frame of "
        "those clips. The motion should carry over, but not the appearance. The floor is the score of the base model, "
        "which has never seen those clips.",
        "cosine",
        "lower",
    ),
    "identity": About(
        "Identity",
        "How often a frame shows this exact subject (by the same test as for pictures), relative to how often true "
        "pictures of the subject pass this test.",
    ),
    "both": About("Both at once", "How often a frame shows this exact subject in a clip whose motion is recognized."),
    "freedom": About(
        "Freedom",
        "How much the subject's pose differs between seeds at the same moment: 0 means as little as in true pictures "
        "in one pose, and 1 means as much as in true pictures from random views. Only crops of verified frames are "
        "compared. Freedom is not measured if fewer than 30% of the pairs of frames are verified. A motion that turns the "
        "subject the same way every time lowers freedom.",
        "score",
    ),
    "dynamic_degree": About(
        "Dynamic degree",
        "How much movement there is from frame to frame: the mean length of the longest 5% of the optical-flow vectors, "
        "as a share of the frame's shorter side. Read it together with temporal consistency.",
        "share",
    ),
    "temporal_consistency": About(
        "Temporal consistency",
        "Mean cosine between consecutive frames. A frozen clip scores 1, so read it together with dynamic degree.",
        "cosine",
    ),
    "frozen": About("Frozen", "How many of the clips show no motion.", better="lower"),
    "dynamic": About(
        "Dynamic",
        "How many of the clips move faster than VBench's threshold (6/256 of the shorter side per frame) for at least "
        "a quarter of their frames.",
    ),
    "consistency_all_pairs": About(
        "Consistency, all pairs", "Mean cosine over all pairs of frames in a clip, as some papers report it.", "cosine"
    ),
    "path_distance": About(
        "Distance to the nearest path",
        "Measured in units of a clearly visible difference (a tenth of the frame, or 45°).",
        "count",
        "lower",
    ),
    "error_position_px": About(
        "Path error: place", "Root mean square error over the clip, in pixels.", "count", "lower"
    ),
    "error_scale": About(
        "Path error: size", "Root mean square error of the log size. A value of 0.1 means about 10%.", "count", "lower"
    ),
    "error_azimuth_deg": About("Path error: azimuth", "In degrees.", "count", "lower"),
    "error_elevation_deg": About("Path error: elevation", "In degrees.", "count", "lower"),
    "error_roll_deg": About("Path error: roll", "In degrees.", "count", "lower"),
    "subject_crops": About(
        "Masked likeness",
        "Mean cosine between frames and references, both cropped to the subject, so that the surroundings do not "
        "count.",
        "cosine",
    ),
    "thing_recognised": About("Thing recognized", ABOUT_PICTURES["recognised"].explanation),
    "copied": About("Copies", "How many of the frames repeat a reference picture.", better="lower"),
    "class": About("Class", "How often a frame shows an object of the class in the prompt."),
    "background": ABOUT_PICTURES["background"],
    "view": ABOUT_PICTURES["view"],
    "accessory": ABOUT_PICTURES["accessory"],
    "style": ABOUT_PICTURES["style"],
    "clip_t": About(
        "CLIP-T", "Mean cosine between the frames and the prompt (without the motion's name) in CLIP.", "cosine"
    ),
    "clip_i": ABOUT_PICTURES["clip_i"],
    "dino_i": ABOUT_PICTURES["dino_i"],
    "identity_i": ABOUT_PICTURES["identity_i"],
    "spread": About(
        "Spread over seeds",
        "How different the clips of one prompt are: 1 minus the mean cosine between whole frames at the same moment.",
        "score",
    ),
}
