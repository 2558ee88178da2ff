"""Sheets of labelled pictures."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL = 192  # pixels of a picture on a sheet


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str]) -> Image.Image:
    """Rows of pictures with a label each; `captions` stand under the pictures of the last row."""
    columns = max(len(pictures) for _, pictures in rows)
    margin, line = CELL // 16, CELL // 8
    height = margin + len(rows) * (CELL + line + margin) + line
    sheet = Image.new("RGB", (margin + columns * (CELL + margin), height), "white")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(CELL // 12), ImageFont.load_default(CELL // 17)
    top = margin
    for label, pictures in rows:
        draw.text((margin, top), label, fill="black", font=font)
        top += line
        for column, picture in enumerate(pictures):
            # small pictures keep their pixels' edges, large ones are smoothed
            kernel = Image.Resampling.NEAREST if min(picture.size) < CELL else Image.Resampling.LANCZOS
            sheet.paste(ImageOps.fit(picture, (CELL, CELL), kernel), (margin + column * (CELL + margin), top))
        top += CELL + margin
    for column, caption in enumerate(captions):
        while caption and draw.textlength(caption, font=small) > CELL:
            caption = caption[:-2].rstrip(" .") + "…" if len(caption) > 2 else ""
        draw.text((margin + column * (CELL + margin), top - margin // 2), caption, fill="black", font=small)
    return sheet
