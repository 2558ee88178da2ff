"""Sheets of labelled pictures."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL = 192  # pixels of a picture on a sheet


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str], cell: int = CELL
) -> Image.Image:
    """Rows of pictures with a label each; `captions` stand under the pictures of the last row.  `cell`: pixels of a side."""
    columns = max(len(pictures) for _, pictures in rows)
    margin, line = cell // 16, cell // 8
    height = margin + len(rows) * (cell + line + margin) + line
    sheet = Image.new("RGB", (margin + columns * (cell + margin), height), "white")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(cell // 12), ImageFont.load_default(cell // 17)
    top = margin
    for label, pictures in rows:
        draw.text((margin, top), label, fill="black", font=font)
        top += line
        for column, picture in enumerate(pictures):
            # small pictures keep their pixels' edges, large ones are smoothed
            kernel = Image.Resampling.NEAREST if min(picture.size) < cell else Image.Resampling.LANCZOS
            sheet.paste(ImageOps.fit(picture, (cell, cell), kernel), (margin + column * (cell + margin), top))
        top += cell + margin
    for column, caption in enumerate(captions):
        while caption and draw.textlength(caption, font=small) > cell:
            caption = caption[:-2].rstrip(" .") + "…" if len(caption) > 2 else ""
        draw.text((margin + column * (cell + margin), top - margin // 2), caption, fill="black", font=small)
    return sheet
