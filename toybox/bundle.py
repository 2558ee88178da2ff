"""`python -m toybox.bundle` writes the photos of every subject into toybox/subjects/<subject>/<setting>.png."""

from pathlib import Path

from toybox.world import PHOTO_SETTINGS, SUBJECTS, subject_photos

SUBJECTS_FOLDER = Path(__file__).resolve().parent / "subjects"


def bundle(folder: Path = SUBJECTS_FOLDER) -> list[Path]:
    """Renders the photos of all subjects into `folder`; returns their paths."""
    paths = []
    for name in SUBJECTS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for setting, photo in zip(PHOTO_SETTINGS[name], subject_photos(name), strict=True):
            paths.append(folder / name / f"{setting}.png")
            photo.save(paths[-1], optimize=True)
    return paths


if __name__ == "__main__":
    print(f"{len(bundle())} photos in {SUBJECTS_FOLDER}")
