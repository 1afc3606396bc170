'use strict';
'require view';
'require poll';
'require cgtproxy.tools as tools';

const EVERY = 3, KEPT = 60;

/* Bytes a second of each target, newest last. */
const history = {};
let before = null;

function measured(status) {
	const now = Date.now() / 1000;
	const bytes = {};
	for (const target of (status.targets || []))
		bytes[target.name] = target.bytes;
	for (const name in bytes) {
		const rates = history[name] = history[name] || [];
		const old = before && before.bytes[name];
		/* a counter that fell began anew, by a reload */
		if (bytes[name] != null && old != null && bytes[name] >= old)
			rates.push((bytes[name] - old) / (now - before.at));
		else
			rates.push(0);
		rates.splice(0, rates.length - KEPT);
	}
	before = { at: now, bytes: bytes };
}

function graph(rates) {
	const top = Math.max(1, ...rates);
	const points = rates.map((rate, i) => '%d,%.1f'.format((KEPT - rates.length + i) * 2, 23 - rate / top * 22));
	const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
	svg.setAttribute('viewBox', '0 0 120 24');
	svg.setAttribute('width', '120');
	svg.setAttribute('height', '24');
	const line = document.createElementNS('http://www.w3.org/2000/svg', 'polyline');
	line.setAttribute('points', points.join(' '));
	line.setAttribute('fill', 'none');
	line.setAttribute('stroke', 'currentColor');
	svg.appendChild(line);
	return svg;
}

const amount = (value) => value == null ? '-' : '%1024.1mB'.format(value);

function table(titles, rows, none) {
	const head = E('tr', { 'class': 'tr table-titles' }, titles.map(title => E('th', { 'class': 'th' }, [ title ])));
	const body = rows.map(row => E('tr', { 'class': 'tr' },
		row.map((cell, i) => E('td', { 'class': 'td', 'data-title': titles[i] }, [ cell == null ? '-' : cell ]))));
	if (!rows.length)
		body.push(E('tr', { 'class': 'tr placeholder' }, [ E('td', { 'class': 'td', 'colspan': titles.length }, [ none ]) ]));
	return E('table', { 'class': 'table' }, [ head ].concat(body));
}

function state(reply) {
	if (reply.error)
		return E('p', { 'class': 'alert-message warning' }, [ reply.error.join(' ') ]);
	const status = reply.status || {};
	if (reply.enabled === false)
		return E('p', { 'class': 'alert-message warning' }, [ _('The service is disabled.') ]);
	if (!status.in_force)
		return E('p', { 'class': 'alert-message warning' }, [ _('Nothing is in force: the service does not run.') ]);
	return E('p', {}, [ _('In force; what no rule decides goes: %s').format(status.default) ]);
}

/* Whether somebody listens on its port, by protocol. */
function listens(target) {
	if (!target.listens)
		return '-';
	const there = [ 'tcp', 'udp' ].filter(protocol => target.listens[protocol]);
	return there.length ? there.join(' ') : E('strong', {}, [ _('nothing listens') ]);
}

function targets(status) {
	return table([ _('Target'), _('Listens'), _('Cgroups'), _('Packets'), _('Bytes'), _('Refused'), _('Rate'), '' ],
		(status.targets || []).map(target => {
			const rates = history[target.name] || [ 0 ];
			return [ target.name, listens(target), target.cgroups, target.packets, amount(target.bytes), target.refused,
				target.bytes == null ? '-' : amount(rates[rates.length - 1]) + '/s', graph(rates) ];
		}), _('Nothing is in force.'));
}

function routing(status) {
	const of = (what, entries) => (entries || []).map(entry => ({ present: entry.present,
		text: 'ip %s%s add %s'.format(entry.family == 'ipv6' ? '-6 ' : '', what, entry.text) }));
	const all = of('rule', status.rules).concat(of('route', status.routes));
	const missing = all.filter(entry => entry.present === false);
	if (!missing.length)
		return E('p', {}, [ _('All %d ip rules and routes are present.').format(all.length) ]);
	return E('div', { 'class': 'alert-message warning' }, [ _('Missing:'), E('ul', {},
		missing.map(entry => E('li', {}, [ E('code', {}, [ entry.text ]) ]))) ]);
}

function applications(apps) {
	return table([ _('Cgroup'), _('User'), _('Flows'), _('Protocols'), _('Remote hosts'), _('Target'), _('Decided by') ],
		apps.map(app => [ app.cgroup, app.user, app.flows, (app.protocols || []).join(' '), (app.remotes || []).join(' '),
			app.target, app.rule ? app.rule.match : E('em', {}, [ _('default') ]) ]), _('Nobody talks now.'));
}

function findings(found) {
	const wrong = (found.findings || []).filter(line => /^(error|warning): /.test(line));
	if (!wrong.length)
		return E('p', {}, [ _('Nothing is wrong.') ]);
	return E('ul', {}, wrong.map(line => E('li', {}, [ line ])));
}

return view.extend({
	handleSave: null,
	handleSaveApply: null,
	handleReset: null,

	load: () => Promise.all([ tools.status(), tools.apps(), tools.check() ]),

	render: function([ status, apps, found ]) {
		const show = (id, content) => {
			const at = document.getElementById(id);
			if (at)
				at.replaceChildren(content);
		};
		measured(status.status || {});
		poll.add(() => Promise.all([ tools.status(), tools.apps() ]).then(([ status, apps ]) => {
			measured(status.status || {});
			show('cgtproxy-state', state(status));
			show('cgtproxy-targets', targets(status.status || {}));
			show('cgtproxy-routing', routing(status.status || {}));
			show('cgtproxy-apps', applications(apps));
		}), EVERY);
		tools.tell_refused(status);
		const part = (title, id, content) => E('div', { 'class': 'cbi-section' },
			[ E('h3', {}, [ title ]), E('div', { 'id': id }, [ content ]) ]);
		return E('div', {}, [
			E('h2', {}, [ _('Proxy per application') ]),
			E('div', { 'id': 'cgtproxy-state' }, [ state(status) ]),
			part(_('Targets'), 'cgtproxy-targets', targets(status.status || {})),
			part(_('Applications'), 'cgtproxy-apps', applications(apps)),
			part(_('What is wrong'), 'cgtproxy-findings', findings(found)),
			part(_('Routing'), 'cgtproxy-routing', routing(status.status || {}))
		]);
	}
});
