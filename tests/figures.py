"""Where the parts of a matplotlib Figure lie."""


def collisions(figure) -> list[str]:
    """Names titles and legends that lie over something else, or that the edge cuts off."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # optional, as in the package

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    words = {f"legend of the figure {n}": part for n, part in enumerate(figure.legends)}
    words |= {"title": figure._suptitle} if figure._suptitle else {}
    for number, axes in enumerate(figure.axes):
        words |= {f"legend of axes {number}": axes.get_legend()} if axes.get_legend() else {}
        above = [text for text in axes.texts if text.get_transform() == axes.transAxes]
        words |= {f"{text.get_text()} of axes {number}": text for text in above}
    boxes = {name: part.get_window_extent(renderer) for name, part in words.items()}
    axes = {f"axes {n}": x.get_window_extent(renderer) for n, x in enumerate(figure.axes)}
    found = [
        f"{name} over {other}"
        for name, box in boxes.items()
        for other, there in (boxes | axes).items()
        if name != other and box.overlaps(there)
    ]
    edge = figure.bbox
    inside = (
        box.x0 >= 0 and box.y0 >= 0 and box.x1 <= edge.x1 and box.y1 <= edge.y1
        for box in boxes.values()
    )
    return found + [f"{name} cut off" for name, ok in zip(boxes, inside, strict=True) if not ok]
