#!/usr/bin/env python3
"""figures.py RESULTS SVG: draws the picture of README's figures from what `make bench` has written,
and prints the rows of README's table. Both come from RESULTS alone, so they say the same; what
`make vm-bench` has counted in guests.json beside it is in the rows, too.

figures.py --agree RESULTS...: whether runs on other machines, or beside other loads, say the same of
each target. Prints each row of which they do not; exit status 1 where one says yes and another no.
"""
import json, os, sys
from math import log
from xml.sax.saxutils import escape

OURS = 'cgtproxy'
COUNTS = [50, 2000, 10000]
# what else does the same work, as the bench names it, and in few words
LEVELS = 'one look-up a level, six levels'
LEGACY, COMPAT = "cgproxy's rules, iptables-legacy", "cgproxy's rules, iptables-nft"
SET, USER = 'one rule of one set', 'one rule for a user'
WAYS = {LEVELS: 'a look-up per level', LEGACY: "cgproxy's, iptables-legacy",
        COMPAT: "cgproxy's, iptables-nft", SET: 'one rule of one set', USER: 'one rule for a user'}
FLOOR, VERDICTS = 'floor', 'floor with a verdict map'


class Results:
    def __init__(self, path):
        with open(path) as file:
            read = json.load(file)
        self.machine, self.rows = read['machine'], read['rows']

    def row(self, figure, beside=None):
        """None where it was not measured."""
        found = (r for r in self.rows if r['figure'] == figure)
        return next((r for r in found if beside in (None, r['reference_name'])), None)

    def value(self, figure):
        row = self.row(figure)
        return row and row['value']

    def reference(self, figure, beside=None):
        row = self.row(figure, beside)
        return row and row['reference']

    def others(self, figure, ways):
        """(name, value) of each way that was measured beside a figure."""
        return [(WAYS[way], self.reference(figure, way)) for way in ways if self.row(figure, way)]


def number(value):
    """Three significant digits at most."""
    if value is None:
        return 'not measured'
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2
    return f'{value:,.{digits}f}'


def packets(results):
    """(title, [(name, ns, whether it is ours)]) for each kind of packet."""
    few, many = 'packet, undecided, over (b)', 'packet, undecided, 30 pairs, over (b)'
    proxied = 'packet, proxied, over (d)'
    ways = [LEVELS, LEGACY, COMPAT]
    def bars(own, figure, ways):
        return ([(name, results.value(figure), True) for name, figure in own if results.row(figure)]
                + [(*other, False) for other in results.others(figure, ways)])
    return [
        ('A packet that no rule decides, ns over conntrack alone',
         bars([(f'{OURS}, 3 pairs of level and target', few), (f'{OURS}, 30 pairs', many)], few,
              ways + [SET, USER])),
        ('A proxied packet, ns over the way through lo to the proxy',
         bars([(OURS, proxied)], proxied, ways)),
    ]


def latencies(results):
    """(name, [µs by COUNTS], whether it is ours)."""
    figures = [f'latency p50, {count} cgroups' for count in COUNTS]
    return [(OURS, [results.value(f) for f in figures], True),
            ('the least: read inotify, ask the id, send one element', [results.reference(f, FLOOR) for f in figures], False),
            ('the least, with a verdict map', [results.reference(f, VERDICTS) for f in figures], False)]


STYLE = '''
  .back { fill: #ffffff } .text { fill: #1f2328 } .dim { fill: #59636e }
  .line { stroke: #d1d9e0 } .ours { fill: #0969da } .other { fill: #a3adb8 }
  .ours-line { stroke: #0969da } .other-line { stroke: #818b98 }
  @media (prefers-color-scheme: dark) {
    .back { fill: #0d1117 } .text { fill: #f0f6fc } .dim { fill: #9198a1 }
    .line { stroke: #3d444d } .ours { fill: #4493f8 } .other { fill: #656c76 }
    .ours-line { stroke: #4493f8 } .other-line { stroke: #9198a1 }
  }
  text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
  .title { font-weight: 600 } .small { font-size: 11px }
'''
WIDTH, LEFT, RIGHT = 760, 250, 70


class Picture:
    def __init__(self):
        self.parts, self.y = [], 34

    def text(self, x, y, text, kind='text', anchor='start'):
        self.parts.append(f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, x1, y1, x2, y2, kind='line', more=''):
        self.parts.append(f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" class="{kind}" {more}/>')

    def bars(self, title, bars):
        self.text(20, self.y, title, 'text title')
        self.y += 14
        most = max(value for _, value, _ in bars)
        for name, value, ours in bars:
            width = max(1, (WIDTH - LEFT - RIGHT) * value / most)
            kind = 'ours' if ours else 'other'
            self.text(LEFT - 10, self.y + 14, name, 'text', 'end')
            self.parts.append(f'<rect x="{LEFT}" y="{self.y + 2}" width="{width:.0f}" height="16" rx="2" class="{kind}"/>')
            self.text(LEFT + width + 6, self.y + 14, number(value), 'text')
            self.y += 23
        self.y += 28

    def curves(self, title, curves):
        """A logarithmic axis upwards; sideways the numbers of cgroups, as far apart as they fit."""
        self.text(20, self.y, title, 'text title')
        top, height = self.y + 20, 190
        values = [v for _, vs, _ in curves for v in vs if v]
        ticks = [t for t in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
                 if min(values) / 2.1 < t < max(values) * 2.1]
        low, high = log(ticks[0]), log(ticks[-1])
        down = lambda value: top + height * (1 - (log(value) - low) / (high - low))
        xs = [110, 270, 430]
        for tick in ticks:
            self.line(60, down(tick), 470, down(tick))
            self.text(52, down(tick) + 4, f'{tick:,} µs', 'dim small', 'end')
        for x, count in zip(xs, COUNTS):
            self.text(x, top + height + 20, f'{count:,} cgroups', 'dim small', 'middle')
        ends = []
        for name, values, ours in curves:
            points = [(x, down(v)) for x, v in zip(xs, values) if v]
            kind = 'ours' if ours else 'other'
            path = ' '.join(f'{x:.0f},{y:.0f}' for x, y in points)
            self.parts.append(f'<polyline points="{path}" class="{kind}-line" fill="none" stroke-width="2"/>')
            for x, y in points:
                self.parts.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3.5" class="{kind}"/>')
            ends.append((points[-1][1], name))
        for i, x in enumerate(xs):
            # above its point, or below where the next one is near
            above = None
            for value in sorted((vs[i] for _, vs, _ in curves if vs[i]), reverse=True):
                near = above is not None and down(value) - above < 26
                self.text(x, down(value) + (18 if near else -8), number(value), 'text small', 'middle')
                above = down(value)
        # names stand beside the ends of the lines, and not on each other
        last = 0
        for y, name in sorted(ends):
            last = max(y + 4, last + 16)
            self.text(482, last, name)
        self.y = top + height + 52

    def write(self, path, foot):
        self.text(20, self.y, foot, 'dim small')
        height = self.y + 18
        body = '\n'.join(self.parts)
        with open(path, 'w') as file:
            file.write(
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
                f'aria-label="What a packet costs and how soon a new cgroup is classified, beside other ways">\n'
                f'<style>{STYLE}</style>\n<rect width="{WIDTH}" height="{height}" rx="6" class="back"/>\n{body}\n</svg>\n')


def best(others):
    """The best of them first."""
    return '; '.join(f'{number(value)} ns: {name}' for name, value in sorted(others, key=lambda other: other[1]))


def table(results):
    """README's rows."""
    def each(figures, of):
        return ' / '.join(number(of(figure)) for figure in figures)
    by = lambda pattern, counts: [pattern.format(count) for count in counts]
    latency, start = by('latency p50, {} cgroups', COUNTS), by('start to ready, {} cgroups', [50, 1000, 10000])
    floor, verdicts = (lambda f: results.reference(f, FLOOR)), (lambda f: results.reference(f, VERDICTS))
    rows = [
        ('a service starts: time until its rule holds (with `hold`, nothing leaves before), with 50 / 2,000 / 10,000 '
         'cgroups on the host, all on one processor, median',
         f'{each(latency, results.value)} µs',
         f'{each(latency, floor)} µs: a minimal loop that reads inotify, asks for the id and sends one element; '
         f'{each(latency, verdicts)} µs: the same with a verdict map in place of a set'),
        ('one starts below a cgroup that has its target', 'no time: it holds from the first packet', ''),
        ('10,000 services start at once: none is missed, and the last one\'s rule holds',
         f'{number(results.value("burst, last element after last mkdir"))} ms after',
         f'{number(results.reference("burst, last element after last mkdir"))} ms: making their cgroups'),
        ('cgtproxy starts, with 50 / 1,000 / 10,000 cgroups', f'{each(start, results.value)} ms',
         f'{each(start, results.reference)} ms: to watch each, and `nft -f` of the same table'),
        ('a reload, with 1,000 cgroups and 100 rules', f'{number(results.value("reload, 1000 cgroups, 100 rules"))} ms',
         f'{number(results.reference("reload, 1000 cgroups, 100 rules"))} ms: `nft -f`'),
        ('memory, with 50 / 1,000 / 10,000 cgroups',
         f'{each(by("RSS, {} cgroups", [50, 1000, 10000]), results.value)} MiB', ''),
        ('to find the rule of a new cgroup among 100', f'{number(results.value("a path against 100 rules"))} µs',
         f'{number(results.reference("a path against 100 rules"))} µs: every regex tried'),
    ]
    ways = [SET, USER, LEGACY, COMPAT, LEVELS]
    for kind, name, base, over in [
            ('undecided', 'a packet that no rule decides, beside rules at 3 places of the tree', '(b)', 'over bare conntrack'),
            ('undecided, 30 pairs', 'the same, at 30 places', '(b)', 'over bare conntrack'),
            ('direct', 'a packet that a rule sends directly', '(b)', 'over bare conntrack'),
            ('proxied', 'a packet to a proxy', '(d)', 'over the way through lo to the proxy')]:
        figure = f'packet, {kind}, over {base}'
        if results.row(figure):
            rows.append((f'{name}, {over}', f'{number(results.value(figure))} ns', best(results.others(figure, ways))))
    for what, name in [('TCP connects', 'TCP connections a second'), ('round trips of a byte', 'round trips of one byte a second')]:
        for kind in ('direct', 'proxied'):
            figure = f'{what}, {kind}'
            ways = [('none classified', 'none classified')] + list(WAYS.items())
            others = [(name, results.reference(figure, way)) for way, name in ways if results.row(figure, way)]
            if others:
                beside = '; '.join(f'{number(value)}: {name}' for name, value in sorted(others, key=lambda o: -o[1]))
                rows.append((f'{name}, {kind}', number(results.value(figure)), beside))
    through = by('proxied throughput, {} streams', [1, 8])
    rows.append(('through a TPROXY relay, 1 / 8 streams', f'{each(through, results.value)} Gbit/s',
                 f'{each(through, results.reference)} Gbit/s: the same by hand, without cgtproxy'))
    return rows


# guests of `make vm-bench`, and what they are
GUESTS = {'armhf-6.1': 'ARMv7', 'arm64-6.12': 'ARMv8', 'mipsel-6.1': 'MIPS', 'mips-6.1': 'MIPS, big-endian',
          'riscv64': 'RISC-V'}


def counted(guests):
    """README's rows of what was counted in guests: {guest: {figure: instructions}}."""
    def over(kind, base):
        return ' / '.join(number(guest[f'packet, {kind}'] - guest[f'packet, {base}']) for guest in guests.values())
    def each(figure):
        return ' / '.join(number(guest[figure]) for guest in guests.values())
    names = ' / '.join(GUESTS.get(name, name) for name in guests)
    bare, lo = 'conntrack only', 'all to the proxy and none classified'
    return [(f'instructions for a packet that no rule decides, on {names}, over bare conntrack', over('undecided', bare),
             f'{each(f"packet, {bare}")}: the packet itself'),
            ('for one that a rule sends directly, over bare conntrack', over('direct', bare), ''),
            ('for one that is dropped, which is not sent then', each('packet, dropped'), ''),
            ('for one to a proxy, over the way through lo to the proxy', over('proxied', lo), f'{each(f"packet, {lo}")}: that way'),
            ('for a new cgroup, from mkdir until its rule holds', each('new cgroup'),
             f'{each("new cgroup, the least")}: a minimal loop; {each("new cgroup, mkdir alone")}: mkdir alone')]


def agree(paths):
    """Rows of which one run says yes and another no; what is unclear contradicts nobody."""
    runs = [Results(path) for path in paths]
    said = {}
    for run in runs:
        for row in run.rows:
            if row['target']:
                said.setdefault((row['figure'], row['reference_name'], row['target']), []).append(row)
    words = {True: 'yes', False: 'NO', None: 'unclear'}
    apart = 0
    for (figure, reference, target), rows in said.items():
        mets = [row['met'] for row in rows]
        apart += {True, False} <= set(mets)
        if len(set(mets)) > 1 or len(rows) < len(runs):
            beside = f' beside {reference}' if reference else ''
            values = [row['value'] if row['ratio'] is None else row['ratio'] for row in rows]
            each = ', '.join(f'{words[met]} ({number(value)})' for met, value in zip(mets, values))
            print(f'{"APART" if {True, False} <= set(mets) else "open "}  {figure}{beside}, {target}: {each}')
    yes = sum(all(row['met'] for row in rows) and len(rows) == len(runs) for rows in said.values())
    print(f'{len(said)} targets: {yes} met in all of {len(runs)} runs, {apart} met in one and missed in another')
    return apart


def main():
    if sys.argv[1] == '--agree':
        sys.exit(1 if agree(sys.argv[2:]) else 0)
    results = Results(sys.argv[1])
    picture = Picture()
    for title, bars in packets(results):
        picture.bars(title, bars)
    picture.curves('A new cgroup, mkdir to its element in the kernel, median', latencies(results))
    picture.write(sys.argv[2], f'Measured in one run on {results.machine}. Shorter and lower is better.')
    rows = table(results)
    guests = os.path.join(os.path.dirname(sys.argv[1]), 'guests.json')
    if os.path.exists(guests):
        with open(guests) as file:
            rows += counted(json.load(file))
    for row in [('what', 'cgtproxy', 'beside'), ('---',) * 3] + rows:
        print(f'| {" | ".join(row)} |')


main()
