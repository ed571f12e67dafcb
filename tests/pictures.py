"What is wrong with a picture: nothing in its axes, text that is cut off or lies upon other text"

def wrong(fig):
    "Complaints about a matplotlib figure"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    if not hasattr(fig.canvas, 'get_renderer'): FigureCanvasAgg(fig)
    for _ in range(2): fig.canvas.draw()     # as savefig does; a layout is settled by the second time
    page, r = fig.bbox, fig.canvas.get_renderer()
    out = [f'axes {i} hold nothing' for i, ax in enumerate(fig.axes) if (ax.axison or ax.get_title()) and not ax.has_data()]
    none = {id(t) for ax in fig.axes for t in hidden(ax)}
    boxes = [(t.get_text(), t.get_window_extent(r)) for t in fig.findobj(Text)
        if t.get_visible() and t.get_text().strip() and id(t) not in none]
    out += [f'{s!r} is cut off' for s, b in boxes if b.x0 < page.x0-1 or b.y0 < page.y0-1 or b.x1 > page.x1+1 or b.y1 > page.y1+1]
    apart = lambda a, b: a.x1 <= b.x0+1 or b.x1 <= a.x0+1 or a.y1 <= b.y0+1 or b.y1 <= a.y0+1
    out += [f'{s!r} lies upon {z!r}' for i, (s, b) in enumerate(boxes) for z, c in boxes[:i] if not apart(b, c)]
    out += [f'{s!r} is too small to read'
        for s, z in {(t.get_text(), t.get_fontsize()) for t in fig.findobj(Text) if t.get_text().strip()} if z < 7]
    return out

def hidden(ax):
    "Texts of axes that are not drawn: all but the titles where they are switched off, and those of ticks beyond them"
    ticks = [(axis, k) for axis in (ax.xaxis, ax.yaxis) for k in (*axis.majorTicks, *axis.minorTicks)]
    if not ax.axison:
        return [ax.xaxis.label, ax.yaxis.label, ax.xaxis.offsetText, ax.yaxis.offsetText,
            *(t for _, k in ticks for t in (k.label1, k.label2))]
    inside = lambda axis, k: min(axis.get_view_interval()) <= k.get_loc() <= max(axis.get_view_interval())
    return [t for axis, k in ticks if not inside(axis, k) for t in (k.label1, k.label2)]
