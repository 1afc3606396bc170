'use strict';
'require view';
'require form';
'require uci';
'require cgtproxy.tools as tools';

const KINDS = [ 'service', 'app', 'user', 'group', 'match' ];

/* What talks now, as values of a rule: names where it has one, its user, and its cgroup as a pattern
   that matches it alone. */
function offered(apps) {
	const all = { service: new Set(), app: new Set(), user: new Set(), group: new Set(), match: new Set() };
	for (const app of apps) {
		const service = /^\/(?:services\/|openrc\.)([A-Za-z0-9_.-]+)/.exec(app.cgroup);
		if (service)
			all.service.add(service[1]);
		/* the line that `apps` has for it */
		const line = /^[^ ]+ = (service|app|user|group):([^,]+)$/.exec(app.line || '');
		if (line)
			all[line[1]].add(line[2]);
		/* everything on a router is root's */
		if (app.user && app.uid)
			all.user.add(app.user);
		if (app.cgroup && app.cgroup != '/')
			all.match.add(app.cgroup.replace(/[\\.*+?()|\[\]{}^$]/g, '\\$&'));
	}
	return all;
}

/* What a rule covers, as its lines in the file say it. */
function covers(id) {
	const rule = uci.get('cgtproxy', id);
	return KINDS.flatMap(kind => L.toArray(rule[kind]).map(value => kind == 'match' ? value : kind + ':' + value)).join(', ') || '-';
}

return view.extend({
	load: () => Promise.all([ tools.apps(), tools.status(), uci.load('cgtproxy') ]),

	render: function([ apps, status ]) {
		const choices = offered(apps);
		const map = tools.map(_('Rules'),
			_('The first rule that covers an application decides; what no rule covers goes by default. Drag to reorder.'));
		const s = map.section(form.GridSection, 'rule');
		s.anonymous = s.addremove = s.sortable = s.nodescriptions = true;
		s.modaltitle = _('Rule');
		let o = s.option(form.Flag, 'enabled', _('Enabled'));
		o.default = '1';
		o.editable = true;
		o = s.option(form.DummyValue, '_covers', _('Covers'));
		o.modalonly = false;
		o.textvalue = covers;
		o = s.option(form.Value, 'name', _('Name'));
		o.modalonly = true;
		o.validate = tools.one_line;
		o = s.option(form.ListValue, 'target', _('Target'));
		tools.targets().forEach(name => o.value(name));
		o.rmempty = false;
		for (const [ name, title, description ] of [
			[ 'service', _('Services'), _('By the name of the service') ],
			[ 'app', _('Applications'), _('By the name of the desktop file') ],
			[ 'user', _('Users'), _('Names, or numbers and ranges of them') ],
			[ 'group', _('Groups'), null ],
			[ 'match', _('Cgroups'), _('Regular expressions on the whole path; what is below is covered too') ]
		]) {
			o = s.option(form.DynamicList, name, title, description);
			o.rmempty = o.optional = o.modalonly = true;
			o.validate = tools.one_line;
			for (const value of (choices[name] || []))
				o.value(value);
		}
		tools.tell_refused(status);
		return map.render();
	},

	handleSaveApply: function(ev, mode) {
		return tools.save_and_apply(this, ev, mode);
	}
});
