'use strict';
'require view';
'require poll';
'require cgtproxy.tools as tools';

const EVERY = 3, KEPT = 60, WIDTH = 180, HEIGHT = 30;

/* Packets and bytes a second of each target, newest last. */
const history = {};
let before = null;

function measured(status) {
	const now = Date.now() / 1000;
	const counts = {};
	for (const target of (status.targets || []))
		counts[target.name] = target;
	for (const name in counts) {
		const rates = history[name] = history[name] || [];
		const old = before && before.counts[name];
		const rate = (what) => {
			const more = old ? counts[name][what] - old[what] : -1;
			/* a counter that fell began anew */
			return more > 0 ? more / (now - before.at) : 0;
		};
		if (before)
			rates.push({ packets: rate('packets'), bytes: rate('bytes') });
		rates.splice(0, rates.length - KEPT);
	}
	before = { at: now, counts: counts };
}

function svg(tag, attributes) {
	const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
	for (const name in attributes)
		node.setAttribute(name, attributes[name]);
	return node;
}

/* The last minutes of a target, the newest to the right, with what its height stands for. */
function graph(rates) {
	const values = rates.map(rate => rate.bytes);
	const top = Math.max(1, ...values), step = WIDTH / (KEPT - 1);
	const points = values.map((value, i) =>
		'%.1f,%.1f'.format(WIDTH - (values.length - 1 - i) * step, HEIGHT - 1 - value / top * (HEIGHT - 3)));
	const image = svg('svg', { viewBox: '0 0 %d %d'.format(WIDTH, HEIGHT), width: WIDTH, height: HEIGHT });
	image.appendChild(svg('line', { x1: 0, x2: WIDTH, y1: HEIGHT - 0.5, y2: HEIGHT - 0.5,
		stroke: 'currentColor', 'stroke-opacity': 0.3 }));
	image.appendChild(svg('polyline', { points: points.join(' '), fill: 'none', stroke: 'currentColor', 'stroke-width': 1.5 }));
	const minutes = KEPT * EVERY / 60;
	return E('span', { 'title': _('The last %d minutes; at most %s').format(minutes, amount(top) + '/s') }, [ image ]);
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

const warning = (text) => E('p', { 'class': 'alert-message warning' }, [ text ]);

function state(reply) {
	const status = reply.status || {};
	if (reply.error)
		return warning(reply.error.join(' '));
	if (reply.enabled === false)
		return warning(_('The service is disabled.'));
	if (!status.in_force)
		return warning(_('Nothing is in force: the service does not run.'));
	if (status.daemon == null)
		return warning(_('The service does not run: what is in force stays, and is not kept in step with new applications.'));
	return E('p', {}, [ _('In force; what no rule decides goes: %s').format(status.default) ]);
}

/* Whether somebody listens on a proxy's port, by protocol, or whether a route leads anywhere. */
function way(status, target) {
	if (target.listens) {
		const there = [ 'tcp', 'udp' ].filter(protocol => target.listens[protocol]);
		return there.length ? _('listens: %s').format(there.join(' ')) : E('strong', {}, [ _('nothing listens') ]);
	}
	const route = (status.ways || []).find(way => way.name == target.name);
	if (!route)
		return '-';
	const by = route.interface || _('table %d').format(route.table);
	const closed = [ [ 'IPv4', route.ipv4 ], [ 'IPv6', route.ipv6 ] ].filter(family => family[1] != 'open');
	if (closed.length < 2)
		return by;
	return E('strong', {}, [ by + ': ' + closed.map(family => family.join(' ')).join(', ') ]);
}

function targets(status) {
	return table([ _('Target'), _('Way'), _('Cgroups'), _('Packets'), _('Bytes'), _('Refused'), _('Now'), '' ],
		(status.targets || []).map(target => {
			const rates = history[target.name] || [];
			const last = rates[rates.length - 1] || { packets: 0, bytes: 0 };
			const counted = target.bytes != null;
			return [ target.name, way(status, target), target.cgroups, target.packets, amount(target.bytes), target.refused,
				counted ? _('%s/s, %d packets/s').format(amount(last.bytes), Math.round(last.packets)) : '-',
				counted ? graph(rates) : '' ];
		}), _('Nothing is in force.'));
}

/* What comes from elsewhere and goes by a target. */
function others(status) {
	const rows = (status.gateways || []).map(gateway =>
		[ _('gateway %s').format(gateway.name), gateway.target, gateway.packets, amount(gateway.bytes) ]);
	for (const entrance of (status.containers || []))
		rows.push([ _('container %s').format(entrance.container || entrance.cgroup || entrance.veth),
			entrance.in_force ? entrance.target : E('strong', {}, [ _('not in force') ]), null, null ]);
	return rows.length ? table([ _('From'), _('Target'), _('Packets'), _('Bytes') ], rows, '') : '';
}

function routing(status) {
	const of = (what, entries) => (entries || []).map(entry => ({ present: entry.present,
		text: 'ip %s%s add %s'.format(entry.family == 'ipv6' ? '-6 ' : '', what, entry.text) }));
	const all = of('rule', status.rules).concat(of('route', status.routes));
	const lines = (entries) => E('ul', {}, entries.map(entry => E('li', {}, [ E('code', {}, [ entry.text ]) ])));
	const missing = all.filter(entry => entry.present === false);
	const present = E('details', {}, [
		E('summary', {}, [ _('%d ip rules and routes are present').format(all.length - missing.length) ]),
		lines(all.filter(entry => entry.present !== false))
	]);
	if (!missing.length)
		return present;
	return E('div', {}, [ E('div', { 'class': 'alert-message warning' }, [ _('Missing:'), lines(missing) ]), present ]);
}

/* The cgroup of an application, or what it has instead. */
function home(app) {
	switch (app.state) {
	case 'removed': return E('em', {}, [ _('a cgroup that was removed') ]);
	case 'elsewhere': return E('em', {}, [ _('a cgroup that is hidden') ]);
	case 'tunnel': return E('em', {}, [ _('a tunnel of the kernel: %s').format(app.tunnel) ]);
	case 'unknown': return E('em', {}, [ _('unknown') ]);
	default: return app.cgroup;
	}
}

function decided(app) {
	switch (app.decides) {
	case 'default': return E('em', {}, [ _('default') ]);
	case 'built-in': return E('em', {}, [ _('built in') ]);
	case 'bypass-user': return E('em', {}, [ 'bypass-user' ]);
	case 'before': return E('em', {}, [ _('as before') ]);
	default: return app.rule && app.rule.match;
	}
}

function applications(apps) {
	const ports = (app) => (app.listens || []).map(port => port.protocol + ':' + port.port).join(' ');
	return table([ _('Application'), _('User'), _('Flows'), _('Remote hosts'), _('Listens'), _('Target'), _('Decided by') ],
		apps.map(app => [ home(app), app.user, app.flows ? app.flows + ' ' + (app.protocols || []).join(' ') : '-',
			(app.remotes || []).join(' ') || '-', ports(app) || '-', app.target, decided(app) ]), _('Nobody talks now.'));
}

/* What the ids of check are about. */
const about = () => ({
	'uci': _('Configuration'),
	'config': _('Configuration'),
	'config-owner': _('Who may write the configuration'),
	'cgroup-root': _('Cgroups'),
	'cgroup-level': _('Cgroups'),
	'rule': _('Rules'),
	'hold': _('Held cgroups'),
	'inotify': _('Limits of the kernel'),
	'stray-service': _('Services without a cgroup'),
	'cgroup-v1-controller': _('Cgroups'),
	'capability': _('Rights'),
	'kernel-feature': _('Modules of the kernel'),
	'tproxy-unused': _('Unused proxies'),
	'limits': _('What a target does not take'),
	'listener': _('Whether the proxy listens'),
	'shared-port': _('Whether the proxy listens'),
	'resolver': _('DNS'),
	'nsswitch': _('DNS'),
	'gateway-interface': _('Gateways'),
	'containers': _('Containers'),
	'lo': _('Device lo'),
	'loop': _('Loops'),
	'bound-socket': _('Applications that choose their device'),
	'route': _('Routes'),
	'routing': _('Others\' rules and routes'),
	'foreign-table': _('Others\' tables'),
	'foreign-chain': _('Others\' tables'),
	'sysctl': _('Settings of the kernel'),
	'saved-ruleset': _('Others\' tables'),
	'conntrack-accounting': _('Settings of the kernel')
});

function findings(found) {
	const words = about();
	const rows = (severity) => found.findings.filter(finding => finding.severity == severity)
		.map(finding => [ words[finding.id] || finding.id, finding.text ]);
	const wrong = rows('error').map(row => [ E('strong', {}, [ _('error') ]) ].concat(row))
		.concat(rows('warning').map(row => [ _('warning') ].concat(row)));
	const fine = rows('ok');
	return E('div', {}, [
		wrong.length ? table([ '', _('About'), _('What, and what to do') ], wrong, '') : E('p', {}, [ _('Nothing is wrong.') ]),
		E('details', {}, [ E('summary', {}, [ _('%d things are as they should be').format(fine.length) ]),
			table([ _('About'), _('What') ], fine, '') ])
	]);
}

return view.extend({
	handleSave: null,
	handleSaveApply: null,
	handleReset: null,

	load: () => Promise.all([ tools.status(), tools.apps(), tools.check() ]),

	render: function([ reply, apps, found ]) {
		const status = reply.status || {};
		/* a list that was opened stays so */
		const show = (id, content) => {
			const at = document.getElementById(id);
			const open = at && at.querySelector('details[open]');
			if (at)
				at.replaceChildren(content);
			if (open && at.querySelector('details'))
				at.querySelector('details').open = true;
		};
		measured(status);
		poll.add(() => Promise.all([ tools.status(), tools.apps() ]).then(([ reply, apps ]) => {
			const status = reply.status || {};
			measured(status);
			show('cgtproxy-state', state(reply));
			show('cgtproxy-targets', targets(status));
			show('cgtproxy-others', others(status));
			show('cgtproxy-routing', routing(status));
			show('cgtproxy-apps', applications(apps));
		}), EVERY);
		tools.tell_refused(reply);
		const part = (title, id, content) => E('div', { 'class': 'cbi-section' },
			[ E('h3', {}, [ title ]), E('div', { 'id': id }, [ content ]) ]);
		return E('div', {}, [
			E('h2', {}, [ _('Proxy per application') ]),
			E('div', { 'id': 'cgtproxy-state' }, [ state(reply) ]),
			part(_('Targets'), 'cgtproxy-targets', targets(status)),
			E('div', { 'id': 'cgtproxy-others' }, [ others(status) ]),
			part(_('Applications'), 'cgtproxy-apps', applications(apps)),
			part(_('What is wrong'), 'cgtproxy-findings', findings(found)),
			part(_('Routing'), 'cgtproxy-routing', routing(status))
		]);
	}
});
